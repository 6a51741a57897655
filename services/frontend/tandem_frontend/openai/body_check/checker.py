"""The process that validates long bodies, as its frontend sees it: started on demand, one body at a time.

Owns the process and the queue before it. When the process fails, only the body that it was validating fails; the next
one gets a new process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
import sys
from functools import partial
from typing import Final

from tandem.clock import monotonic
from tandem.errors import Draining, InvalidRequest, Overloaded, ServiceError
from tandem.service.parent_death import VARIABLE
from tandem_frontend.admission.shares import TenantShares
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest
from tandem_frontend.openai.body_check.limits import PROMPT_IDS_MAX, is_inline
from tandem_frontend.openai.common_params import Schema
from tandem_frontend.openai.request_body import S, parse
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest, EmbeddingsRequest
from tandem_frontend.preparation.encoding.turns import Turns

log = logging.getLogger(__name__)

QUESTION: Final = struct.Struct("<BQ")
"""Index of the schema, length of the body that follows."""
ANSWER: Final = struct.Struct("<Q")
"""Length of the error that follows; 0: the body is valid."""
SCHEMAS: Final[tuple[type[Schema], ...]] = (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    EmbeddingsRequest,
)
NICENESS = 10

WAITING_MAX = 64
"""Bodies that wait at a time; of a megabyte each they take seconds."""
ANSWER_TIMEOUT_S = 60.0
"""The start included. The longest body takes half a second of processor time; a process that takes this long hangs."""
END_TIMEOUT_S = 1.0


class BodyChecker:
    """Parses the bodies of requests; long ones only when a process of low priority has found them valid and small."""

    def __init__(self, context_tokens_max: int, tenant_share: float) -> None:
        """`tenant_share` is the fraction of the queue that one tenant may fill while no other waits."""
        self._prompt_ids_max = PROMPT_IDS_MAX
        self.allow(context_tokens_max)
        self._turns = Turns(1)
        self._waiting = TenantShares(tenant_share, monotonic)
        self._waiting_count = 0
        self._process: _Process | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return None if self._process is None else self._process.pid

    def allow(self, context_tokens_max: int) -> None:
        """Accept prompts of token ids for one more model, of that context."""
        self._prompt_ids_max = max(self._prompt_ids_max, context_tokens_max)

    async def parse(self, schema: type[S], data: bytes, tenant: str) -> S:
        """Parse a request body of a tenant.

        Raises:
            InvalidRequest: the body is not JSON, or a parameter is invalid; its `field` names which.
            Overloaded: too many long bodies wait already.
            ServiceError: the process failed.
        """
        if not is_inline(data):
            await self._check(SCHEMAS.index(schema), data, tenant)
        return parse(schema, data)

    async def close(self) -> None:
        """End the process; bodies that wait fail."""
        self._is_closed = True
        if self._process is not None:
            await self._process.stop()
        await self._turns.wait_idle()
        self._process = None

    async def _check(self, schema: int, data: bytes, tenant: str) -> None:
        if not self._waiting.allows(self._waiting.held(tenant), 1, WAITING_MAX - self._waiting_count):
            raise Overloaded("too many long request bodies are being read", limit="long_bodies")
        self._waiting.add(tenant)
        self._waiting_count += 1
        try:
            error = await self._turns.run(partial(self._ask, schema, data))
        finally:
            self._waiting.remove(tenant)
            self._waiting_count -= 1
        if error:
            raise InvalidRequest(*json.loads(error))

    async def _ask(self, schema: int, data: bytes) -> bytes:
        if self._is_closed:
            raise Draining("this frontend is stopping")
        process = self._process
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                if process is not None and process.prompt_ids_max != self._prompt_ids_max:
                    await process.stop()
                if process is None or process.has_ended:
                    process = self._process = await _Process.start(self._prompt_ids_max)
                return await process.ask(schema, data)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as problem:
            log.error("the process that validates long bodies failed (%s); the next body gets a new one", problem)
            if process is not None:
                await process.stop()
            self._process = None
            raise ServiceError("the process that validates long request bodies failed") from None


class _Process:
    """A started process."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        prompt_ids_max: int,
    ) -> None:
        self.prompt_ids_max = prompt_ids_max
        self._process = process
        self._reader = reader
        self._writer = writer
        self.pid = process.pid

    @classmethod
    async def start(cls, prompt_ids_max: int) -> _Process:
        """Start it. Raises OSError."""
        own_end, its_end = socket.socketpair()
        try:
            with its_end:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "tandem_frontend.openai.body_check"),
                    *(str(its_end.fileno()), str(prompt_ids_max)),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(its_end.fileno(),),
                    # Ctrl-C must reach only the frontend, which finishes its streams first.
                    start_new_session=True,
                    env={**os.environ, VARIABLE: str(os.getpid())},
                )
        except BaseException:  # a cancellation must free the socket too
            own_end.close()
            raise
        return cls(process, *await asyncio.open_connection(sock=own_end), prompt_ids_max)

    @property
    def has_ended(self) -> bool:
        """Whether it has exited or closed its connection."""
        return self._reader.at_eof() or self._process.returncode is not None

    async def ask(self, schema: int, data: bytes) -> bytes:
        """The error of a body as JSON; empty: it is valid."""
        self._writer.write(QUESTION.pack(schema, len(data)))
        self._writer.write(data)
        await self._writer.drain()
        (size,) = ANSWER.unpack(await self._reader.readexactly(ANSWER.size))
        return await self._reader.readexactly(size) if size else b""

    async def stop(self) -> None:
        """End it; a body that is being validated fails. May be called twice."""
        self._writer.transport.abort()
        try:
            # It exits when its connection ends, but not in the middle of a body: it is killed then.
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
