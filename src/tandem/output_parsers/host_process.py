"""The parser host process, from start to end: it has SGLang's parsers loaded and forks the workers that parse.

Owns the process and the hand-over of connections to it. Knows nothing of streams; `pool` restarts the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from tandem.errors import ConfigError, StartError
from tandem.output_parsers.worker_connection import WorkerConnection, WorkerEnded
from tandem.service.parent_death import VARIABLE

MODULE = "tandem.engine.sglang.parsing"
START_TIMEOUT_S = 180.0
"""Importing SGLang takes 5 s of CPU, and far longer from a cold disk."""
FORK_TIMEOUT_S = 30.0
"""A fork takes some 20 ms."""
END_TIMEOUT_S = 2.0


class HostProcess:
    """A parser host process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        """`control` is this side of the socket over which the host receives its workers' connections."""
        self._process = process
        self._control = control
        self._waiting = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, flags: Sequence[str]) -> HostProcess:
        """Start a process; return when it is ready.

        Raises:
            ConfigError: SGLang has no parser of that name; the key is the setting's.
            StartError: the process failed to start, or was not ready within START_TIMEOUT_S.
        """
        control, theirs = socket.socketpair()
        try:
            with theirs:
                process = await _spawn(flags, theirs)
        except BaseException:  # a cancellation must end the process too
            control.close()
            raise
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                assert process.stdout is not None, "stdout is a pipe"
                _check_hello(await process.stdout.readline())
        except TimeoutError:
            await _end(process, control)
            raise StartError(f"the parser host was not ready after {START_TIMEOUT_S:g} s") from None
        except BaseException:  # a cancellation must end the process too
            await _end(process, control)
            raise
        return cls(process, control)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._waiting.done()

    async def wait_ended(self) -> int:
        """Return the exit status once the process has ended."""
        return await asyncio.shield(self._waiting)

    async def start_worker(self) -> WorkerConnection:
        """Fork a worker.

        Raises:
            StartError: the host ended, or did not fork within FORK_TIMEOUT_S; it is then killed.
        """
        own, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        own.setblocking(False)
        try:
            with theirs:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        except OSError as problem:
            own.close()
            raise StartError(f"the parser host has ended: {problem}") from None
        _, worker = await loop.create_unix_connection(WorkerConnection, sock=own)
        try:
            async with asyncio.timeout(FORK_TIMEOUT_S):
                await worker.ready
        except (TimeoutError, WorkerEnded) as problem:
            worker.close()
            if isinstance(problem, WorkerEnded):
                raise StartError("the parser host ended, or a worker did at its start") from None
            self._kill()
            raise StartError(f"the parser host did not fork a worker within {FORK_TIMEOUT_S:g} s") from None
        except BaseException:  # a cancellation must end the process too
            worker.close()
            raise
        return worker

    async def stop(self) -> None:
        """End the process, and with it its workers."""
        await _end(self._process, self._control)
        await self._waiting

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)


async def _spawn(flags: Sequence[str], control: socket.socket) -> asyncio.subprocess.Process:
    """Start the process. Shielded, because asyncio may hang if create_subprocess_exec is cancelled midway."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            *flags,
            stdin=control.fileno(),
            stdout=asyncio.subprocess.PIPE,
            # A session of its own, so that Ctrl-C reaches only the parent, which finishes its streams first.
            start_new_session=True,
            env={**os.environ, VARIABLE: str(os.getpid())},
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        process = await starting
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise


def _check_hello(line: bytes) -> None:
    hello: dict[str, Any] = json.loads(line) if line else {"refused": "the parser host ended before it was ready"}
    if "refused" not in hello:
        return
    if hello.get("key"):
        raise ConfigError(hello["key"], hello["refused"])
    raise StartError(hello["refused"])


async def _end(process: asyncio.subprocess.Process, control: socket.socket) -> None:
    """Close the control socket, at which the process exits; kill it if it has not after END_TIMEOUT_S."""
    control.close()
    try:
        async with asyncio.timeout(END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
