"""One encoding process as its frontend sees it: start, encode, stop.

Owns the connection and the timeouts. Encodes one text at a time; `pool` orders the texts and starts new processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import ServiceError
from tandem.service.parent_death import VARIABLE
from tandem_frontend.preparation.encoding import frames
from tandem_frontend.preparation.encoding.texts import TooManyTokens

START_TIMEOUT_S = 60.0
"""A large tokenizer takes two seconds of CPU time to load, and longer on a busy machine."""
ANSWER_TIMEOUT_S = 60.0
"""A million tokens take 1.5 seconds of CPU time; a process that takes this much longer hangs."""
END_TIMEOUT_S = 1.0
READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The arguments of an encoding process."""

    file: Path
    """The tokenizer.json."""
    digest: str
    """SHA-256 (hex) of its content: with a changed file the ids would be those of another tokenizer."""
    tokens_max: int
    """Limit of tokens of one text."""


class EncoderProcess:
    """A started process that is ready to encode."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, spec: EncoderSpec) -> EncoderProcess:
        """Start a process; return when it is ready.

        Raises:
            ServiceError: it does not start; it has been cleaned up.
        """
        own_end, its_end = socket.socketpair()
        with its_end:
            try:
                process = await _spawn(spec, its_end)
            except BaseException as problem:  # a cancellation must free the socket too
                own_end.close()
                if isinstance(problem, OSError):
                    raise _failed(f"cannot be started: {problem.strerror}") from None
                raise
        started = cls(process, *await asyncio.open_connection(sock=own_end, limit=READ_BYTES))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                kind, content = await started._read()
        except TimeoutError:
            await started.stop()
            raise _failed(f"was not ready within {START_TIMEOUT_S:g} s") from None
        except BaseException:  # a cancellation must end the process too
            await started.stop()
            raise
        if kind != frames.READY:
            await started.stop()
            raise _failed(f"does not start: {content.decode(errors='replace')}")
        return started

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has exited or closed its connection."""
        return self._reader.at_eof() or self._process.returncode is not None

    async def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of a text, as a protobuf list.

        After any failure except TooManyTokens the process must be stopped: a late answer would be read as the next.

        Raises:
            TooManyTokens: the text has more tokens than allowed.
            ServiceError: the process has ended, or did not answer in time.
        """
        content = text.encode()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                self._writer.write(frames.QUESTION.pack(len(content), add_special_tokens))
                self._writer.write(content)
                await self._writer.drain()
                kind, answer = await self._read()
        except TimeoutError:
            raise _failed(f"did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        except ConnectionError:
            raise _failed("has ended") from None
        if kind == frames.TOO_MANY:
            raise TooManyTokens
        return pb.TokenIds.FromString(answer).ids

    async def stop(self) -> None:
        """End it; a text that is being encoded fails with ServiceError. May be called twice."""
        # Aborted, not closed: closing would wait until it has read everything.
        self._writer.transport.abort()
        try:
            # It exits when its connection ends, but not in the middle of a text: it is killed then.
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _read(self) -> tuple[int, bytes]:
        try:
            kind, size = frames.ANSWER.unpack(await self._reader.readexactly(frames.ANSWER.size))
            return kind, await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise _failed("has ended") from None


async def _spawn(spec: EncoderSpec, its_end: socket.socket) -> asyncio.subprocess.Process:
    """Start the process. Cancelling asyncio's call can hang, so a cancellation waits for it and kills the process."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tandem_frontend.preparation.encoding",
            f"--file={spec.file}",
            f"--digest={spec.digest}",
            f"--tokens-max={spec.tokens_max}",
            f"--descriptor={its_end.fileno()}",
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(its_end.fileno(),),
            # Ctrl-C must reach only the frontend, which finishes its streams first.
            start_new_session=True,
            # The library's thread pool does not help with one text at a time.
            env={**os.environ, VARIABLE: str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"},
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        process = await starting
        process.kill()
        await process.wait()
        raise


def _failed(what: str) -> ServiceError:
    return ServiceError(
        f"the process that tokenises long prompts {what}; other prompts are not affected, and a retry starts a new one"
    )
