"""One encoding process as its frontend sees it: started, asked, ended.

Owns the connection and the bound on an answer's time. Takes one text at a time; the order of texts, and the start of
the next process, are `pool`'s.
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
"""A large tokenizer takes two seconds of processor time, which a busy machine gives in its own time."""
ANSWER_TIMEOUT_S = 60.0
"""A million tokens take a second and a half of it; what takes so much longer will not come to an end."""
END_TIMEOUT_S = 1.0
READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What a process needs to know."""

    file: Path
    """The tokenizer.json."""
    digest: str
    """SHA-256, hex, of what it holds: another one's ids would be of another model."""
    tokens_max: int
    """A text of more is not encoded."""


class EncoderProcess:
    """A process that is ready."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, spec: EncoderSpec) -> EncoderProcess:
        """Start one; return when it is ready.

        Raises:
            ServiceError: it does not start; nothing of it is left.
        """
        own_end, its_end = socket.socketpair()
        with its_end:
            try:
                process = await _spawn(spec, its_end)
            except BaseException as problem:
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
        except BaseException:
            await started.stop()
            raise
        if kind != frames.READY:
            await started.stop()
            raise _failed(f"does not start: {content.decode(errors='replace')}")
        return started

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it answers nothing any more."""
        return self._reader.at_eof() or self._process.returncode is not None

    async def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of a text, as a list that protobuf's messages take over as a whole.

        After any failure but TooManyTokens the process must be stopped: an answer may still be on its way.

        Raises:
            TooManyTokens: nothing was encoded.
            ServiceError: the process has ended or does not answer.
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
        """End it; a text that waits for its answer gets ServiceError. Harmless twice."""
        # Not closed: what it has not read yet would be waited for.
        self._writer.transport.abort()
        try:
            # The end of its questions is its end; it is killed when it is in the middle of one.
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
    """Start the process. asyncio may hang when this is cancelled in its middle, so a cancellation waits for its end."""
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
            # Ctrl-C is for the parent, which ends its streams first.
            start_new_session=True,
            # The library's pool of threads is of no use for one text at a time.
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
    return ServiceError(f"the process that tokenises long prompts {what}")
