"""One parser host process, from start to end, and the request-response protocol on its pipes.

Owns the pipe protocol and the response timeout: a host that does not respond is killed, because it serves all streams
in order. Knows nothing of streams; `pool` restarts the process.
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
RESPONSE_TIMEOUT_S = 20.0
END_TIMEOUT_S = 2.0


class ParserProcess:
    """A parser host process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, flags: Sequence[str]) -> ParserProcess:
        """Start a process; return when it is ready.

        Raises:
            ConfigError: SGLang has no parser of that name; the key is the setting's.
            StartError: the process failed to start, or was not ready within START_TIMEOUT_S.
        """
        process = await _spawn(flags)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                assert process.stdout is not None, "stdout is a pipe"
                _check_hello(await process.stdout.readline())
        except TimeoutError:
            await _end(process)
            raise StartError(f"the parser host was not ready after {START_TIMEOUT_S:g} s") from None
        except BaseException:  # a cancellation must end the process too
            await _end(process)
            raise
        return cls(process)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has closed its output and sends no more responses."""
        return self._reading.done()

    async def wait_ended(self) -> int:
        """Return the exit status once the process has ended and every pending request has failed."""
        await asyncio.shield(self._reading)
        return await self._process.wait()

    async def call(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return its response.

        Raises:
            InvalidRequest: the message's content is invalid; names the field.
            ParserFailed: the process has died or timed out, or a parser raised on this message.
        """
        if self.has_ended:
            raise _gone()
        number = next(self._numbers)
        pending = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._write({"n": number, **message})
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                response: dict[str, Any] = await pending
        except TimeoutError:
            # Killed, not only failed: it is stuck in this message, and every other stream is queued behind it.
            self._kill()
            raise ParserFailed(f"the parser host did not respond within {RESPONSE_TIMEOUT_S:g} s") from None
        finally:
            self._pending.pop(number, None)
        if "error" in response:
            if "field" in response:
                raise InvalidRequest(response["field"], response["error"])
            raise ParserFailed(f"the model's output could not be parsed: {response['error']}")
        return response

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message that has no response; ignored if the process has ended."""
        if not self.has_ended:
            self._write({"n": 0, **message})

    async def stop(self) -> None:
        """End the process; pending calls fail with ParserFailed."""
        await _end(self._process)
        await self._reading

    def _write(self, message: Mapping[str, Any]) -> None:
        # Not drained: each stream awaits its response before it sends again, so at most one message each is buffered.
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.write(json.dumps(message, ensure_ascii=False).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        try:
            while line := await self._process.stdout.readline():
                response = json.loads(line)
                pending = self._pending.get(response["n"])
                if pending is not None and not pending.done():
                    pending.set_result(response)
        finally:
            for pending in self._pending.values():
                if not pending.done():
                    pending.set_exception(_gone())

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)


async def _spawn(flags: Sequence[str]) -> asyncio.subprocess.Process:
    """Start the process. Shielded, because asyncio may hang if create_subprocess_exec is cancelled midway."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            *flags,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            # A session of its own, so that Ctrl-C reaches only the parent, which finishes its streams first.
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
    """Close the process's input, at which it exits; kill it if it is still busy after END_TIMEOUT_S."""
    assert process.stdin is not None, "stdin is a pipe"
    process.stdin.close()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
