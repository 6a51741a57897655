"""One life of the parser host's process: started, asked, ended.

Owns the lines between the two and the bound on an answer's time: a host that does not answer is killed, since every
stream waits behind it. Knows nothing of streams; who starts the next one is `parsers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.errors import ConfigError, InvalidRequest, ParserFailed, StartError
from tandem.service.parent_death import VARIABLE

MODULE = "tandem.engine.sglang.parsing"
LINE_BYTES_MAX = 64 * 1_024 * 1_024
START_TIMEOUT_S = 180.0
"""Importing SGLang takes 5 s of CPU, and far longer from a cold disk."""
ANSWER_TIMEOUT_S = 20.0
END_TIMEOUT_S = 2.0


class ParserProcess:
    """A parser host that is ready."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, flags: Sequence[str]) -> ParserProcess:
        """Start one; return when it is ready.

        Raises:
            ConfigError: there is no such parser; the key is the setting's.
            StartError: it cannot start.
        """
        process = await _spawn(flags)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                assert process.stdout is not None, "its output is a pipe"
                _check_hello(await process.stdout.readline())
        except TimeoutError:
            await _end(process)
            raise StartError(f"the parser host was not ready after {START_TIMEOUT_S:g} s") from None
        except BaseException:
            await _end(process)
            raise
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it answers nothing any more."""
        return self._reading.done()

    async def wait_ended(self) -> int:
        """Its exit status, once it has ended and everybody who waited for it knows."""
        await asyncio.shield(self._reading)
        return await self._process.wait()

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            InvalidRequest: the message's content is wrong; names the field.
            ParserFailed: the process has died or does not answer, or this message was too much for a parser.
        """
        if self.has_ended:
            raise _gone()
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write({"n": number, **message})
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                found: dict[str, Any] = await answer
        except TimeoutError:
            self._kill()
            raise ParserFailed(f"the parser host did not answer within {ANSWER_TIMEOUT_S:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in found:
            if "field" in found:
                raise InvalidRequest(found["field"], found["error"])
            raise ParserFailed(f"the model's output could not be parsed: {found['error']}")
        return found

    def tell(self, message: Mapping[str, Any]) -> None:
        """A message that has no answer."""
        if not self.has_ended:
            self._write({"n": 0, **message})

    async def stop(self) -> None:
        """End it; whoever waits for an answer gets ParserFailed."""
        await _end(self._process)
        await self._reading

    def _write(self, message: Mapping[str, Any]) -> None:
        # Not drained: every stream waits for its answer before it writes again, so the pipe holds one message of each.
        assert self._process.stdin is not None, "its input is a pipe"
        self._process.stdin.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process.stdout is not None, "its output is a pipe"
        try:
            while line := await self._process.stdout.readline():
                answer = json.loads(line)
                waiting = self._waiting.get(answer["n"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(_gone())

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)


async def _spawn(flags: Sequence[str]) -> asyncio.subprocess.Process:
    """Start the process. asyncio may hang when this is cancelled in its middle, so a cancellation waits for its end."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            *flags,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            # Ctrl-C is for the parent, which ends its streams first.
            start_new_session=True,
            env={**os.environ, VARIABLE: str(os.getpid())},
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _end(await starting)
        raise


def _gone() -> ParserFailed:
    return ParserFailed("the parser host ended while the model's output was being parsed")


def _check_hello(line: bytes) -> None:
    hello: dict[str, Any] = json.loads(line) if line else {"refused": "the parser host ended before it was ready"}
    if "refused" not in hello:
        return
    if hello.get("key"):
        raise ConfigError(hello["key"], hello["refused"])
    raise StartError(hello["refused"])


async def _end(process: asyncio.subprocess.Process) -> None:
    """The end of its input is the end of the process; killed when it is in the middle of something."""
    assert process.stdin is not None, "its input is a pipe"
    process.stdin.close()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
