"""The connection to one parser worker, and the request-response protocol on it.

Owns the protocol and the response timeout: a worker answers in order, so the oldest message without a response is the
one that it works on. A worker that does not respond is killed. Knows nothing of streams; `pool` replaces the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
from collections.abc import Mapping
from typing import Any, cast

from tandem.errors import InvalidRequest, ParserFailed

RESPONSE_TIMEOUT_S = 20.0
"""Far above what a worker allows a parser (`tandem.engine.sglang.parsing.bounds`): it ends those itself."""


class WorkerEnded(Exception):
    """The worker ended before it responded."""

    def __init__(self, *, was_at_work: bool, did_not_respond: bool) -> None:
        """`was_at_work`: it ended while it worked on this message. `did_not_respond`: it was killed for that."""
        super().__init__("the parser worker did not respond in time" if did_not_respond else "the parser worker ended")
        self.was_at_work = was_at_work
        self.did_not_respond = did_not_respond


class WorkerConnection(asyncio.Protocol):
    """One worker: `ready` once it has reported its process id."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.pid: int | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        """By number, in the order of sending. A cancelled call stays: the worker still works on it."""
        self._parts: list[bytes] = []
        self._progress_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._did_not_respond = False
        self._transport: asyncio.Transport | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the worker has closed its connection and sends no more responses."""
        return self._ended.done()

    @property
    def busy_s(self) -> float:
        """Seconds that the worker has worked on its current message; 0 without one."""
        return self._loop.time() - self._progress_s if self._pending else 0.0

    async def wait_ended(self) -> bool:
        """Return once the worker has ended and every pending call has failed: whether it was killed as stuck."""
        await asyncio.shield(self._ended)
        return self._did_not_respond

    async def call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return its response.

        Raises:
            InvalidRequest: the message's content is invalid; names the field.
            ParserFailed: a parser failed on this message, or exceeded a bound.
            WorkerEnded: the worker ended first.
        """
        if self.has_ended:
            raise WorkerEnded(was_at_work=False, did_not_respond=False)
        number = next(self._numbers)
        self._write({"n": number, **message})
        pending = self._pending[number] = self._loop.create_future()
        if len(self._pending) == 1:
            self._progress_s = self._loop.time()
        if self._watch is None:
            self._watch = self._loop.call_later(RESPONSE_TIMEOUT_S, self._check)
        response: dict[str, Any] = await pending
        if "error" in response:
            if "field" in response:
                raise InvalidRequest(response["field"], response["error"])
            raise ParserFailed(f"the model's output could not be parsed: {response['error']}")
        return response

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message that has no response; ignored if the worker has ended."""
        if not self.has_ended:
            self._write({"n": 0, **message})

    def close(self) -> None:
        """Close the connection, at which the worker exits once it has finished its message."""
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        """Kill the worker. Its process id is its own as long as the connection is open."""
        if self.pid is not None and not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        # A cast: uvloop's transports are no subclasses.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        first, *others = data.split(b"\n")
        self._parts.append(first)
        for part in others:
            self._respond(b"".join(self._parts))
            self._parts = [part]
        self._progress_s = self._loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._watch is not None:
            self._watch.cancel()
        if not self._ended.done():
            self._ended.set_result(None)
        if not self.ready.done():
            self.ready.set_exception(WorkerEnded(was_at_work=False, did_not_respond=False))
        oldest = next(iter(self._pending), None)
        for number, pending in self._pending.items():
            if not pending.done():
                at_work = number == oldest
                pending.set_exception(WorkerEnded(was_at_work=at_work, did_not_respond=self._did_not_respond))
        self._pending.clear()

    def _respond(self, line: bytes) -> None:
        response = json.loads(line)
        if "pid" in response:
            self.pid = response["pid"]
            self.ready.set_result(None)
            return
        pending = self._pending.pop(response["n"], None)
        if pending is not None and not pending.done():
            pending.set_result(response)

    def _write(self, message: Mapping[str, Any]) -> None:
        # Not drained: each stream awaits its response before it sends again, so at most one message each is buffered.
        assert self._transport is not None, "connected"
        self._transport.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")

    def _check(self) -> None:
        """Kill the worker if it has not responded for too long; otherwise look again."""
        self._watch = None
        if not self._pending:
            return
        left_s = self._progress_s + RESPONSE_TIMEOUT_S - self._loop.time()
        if left_s <= 0:
            self._did_not_respond = True
            self.kill()
            return
        self._watch = self._loop.call_later(left_s, self._check)
