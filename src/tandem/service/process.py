"""The lifecycle of a service process, from its arguments to its exit status.

    parse -> start -> announce -> (a signal, or a failure) -> drain -> stop -> exit status

A signal before the process is ready stops it at once: there is nothing to drain.

Exit statuses: 0 clean; 1 failed to start, failed while serving, or a drain cut requests; 2 a setting is invalid;
70 a second signal interrupted the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import uvloop

from tandem import config as configuration
from tandem.config import ServiceConfig
from tandem.errors import ConfigError, StartError
from tandem.exit_codes import EXIT_SECOND_SIGNAL
from tandem.observability import logs
from tandem.service import run_directory
from tandem.service.parent_death import is_orphan

WANTED = 65_536
"""Soft limit of open file descriptors. Not the hard limit, which may be huge: some programs close every descriptor up
to it.
"""


def raise_file_limit() -> None:
    """Raise the soft limit of open file descriptors, at most to the hard limit; never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS reports an infinite hard limit but may still reject the call.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


log = logging.getLogger(__name__)

ABANDON_TIMEOUT_S = 1.5
"""Timeout to stop a service during its start. Needed because an engine's imports cannot be interrupted."""

ORPHAN_CHECK_S = 0.05
"""Delay after which all threads of a dying parent are gone."""


class Service(Protocol):
    """A running service: made by `app.py` of each service, which knows its start and stop order."""

    @property
    def address(self) -> str:
        """host:port it serves on."""
        ...

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: there is none."""
        ...

    async def drain(self) -> bool:
        """Announce the shutdown and finish open requests. Returns whether all finished within the timeout."""
        ...

    async def wait_finished(self) -> str | None:
        """Return the reason when it cannot continue, or None when a call asked it to stop."""
        ...


Lifespan = AbstractAsyncContextManager[Service]
"""Starts a service when entered, and frees all its resources on exit, also when the start fails or is cancelled."""


C = TypeVar("C", bound=ServiceConfig)


def main(program: str, config_type: type[C], build: Callable[[C], Lifespan]) -> int:
    """Run a service until it stops; returns the exit status. `build` prepares the service, without I/O."""
    try:
        config = configuration.load(config_type, program, sys.argv[1:], os.environ)
        return run(program, config, build)
    except StartError as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return problem.exit_status


def run(program: str, config: C, build: Callable[[C], Lifespan], *, process: int | None = None) -> int:
    """Run a service with these settings until it stops; returns the exit status.

    `process` is its number among the processes of one service, for the log.

    Raises:
        StartError: the start failed.
    """
    logs.set_up(config.log_level, config.log_format, program, process)
    raise_file_limit()
    log.info("%s settings %s", program, configuration.effective(config))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(build(config), config.announce_file))


def leave(exit_status: int) -> NoReturn:
    """Exit the process without the interpreter's shutdown, and kill remaining children.

    Libraries leave threads running in a worker's process (gRPC's poller, SGLang's), and the interpreter's shutdown
    fails on them with output after the actual error message. The service itself is stopped by now.
    """
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run_directory.remove_if_empty()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)


def _children() -> list[int]:
    """Processes started by this one that have not been waited for; none where the kernel does not list them."""
    found: list[int] = []
    for file in Path("/proc/self/task").glob("*/children"):
        # A thread may end between the listing and the reading; its children pass to another thread.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, file.read_text().split())
    return found


async def serve(lifespan: Lifespan, announce_file: Path | None = None) -> int:
    """Start, wait for a signal or until the service finishes, drain, stop. Returns the exit status."""
    stop_asked, has_started = asyncio.Event(), asyncio.Event()
    handle_signals(stop_asked)
    # One task enters and leaves the lifespan: a cancelled start is undone by the task that began it.
    living = asyncio.ensure_future(_live(lifespan, stop_asked, has_started, announce_file))
    asked = asyncio.ensure_future(stop_asked.wait())
    await asyncio.wait({living, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if living.done() or has_started.is_set():
        return await living
    await _abandon(living)
    log.info("stopped by a signal during the start")
    return 0


async def _live(
    lifespan: Lifespan, stop_asked: asyncio.Event, has_started: asyncio.Event, announce_file: Path | None
) -> int:
    async with lifespan as service:
        has_started.set()
        # Again, because an engine may have installed its own handlers during its start.
        handle_signals(stop_asked)
        # Modules and objects of the start live as long as the process. Without this, each full garbage collection
        # traverses them, 20 ms in a frontend and longer beside an engine, and blocks every stream meanwhile.
        gc.freeze()
        if announce_file is not None:
            announce(announce_file, service.address, service.metrics_port)
        failure = await _wait_end(service, stop_asked)
        if failure is not None:
            log.error("cannot continue: %s; this process exits with status 1", failure)
            return 1
        return 0 if await service.drain() else 1


def freeze_again() -> None:
    """After a large part of the process was replaced: collect the former one, and freeze the new one as at the start.

    Takes a second beside an engine, in which nothing else runs.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def _abandon(living: asyncio.Future[int]) -> None:
    """Cancel a start and wait until it is undone; exits the process when that takes too long."""
    living.cancel()
    done, _ = await asyncio.wait({living}, timeout=ABANDON_TIMEOUT_S)
    if not done:
        log.info("stopped by a signal during the start, which could not be cancelled within %g s", ABANDON_TIMEOUT_S)
        leave(0)
    if not living.cancelled() and (problem := living.exception()) is not None:
        log.debug("the start failed while it was cancelled", exc_info=problem)


async def _wait_end(service: Service, stop_asked: asyncio.Event) -> str | None:
    """Wait for a stop request (returns None), or a failure (returns the reason)."""
    finished = asyncio.ensure_future(service.wait_finished())
    asked = asyncio.ensure_future(stop_asked.wait())
    await asyncio.wait({finished, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if finished.done():
        return await finished
    finished.cancel()
    return None


def handle_signals(stop_asked: asyncio.Event) -> None:
    """SIGTERM and SIGINT request a stop; a second signal exits the process at once."""

    def handle(number: int) -> None:
        if stop_asked.is_set():
            # The kernel sends the parent-death signal once per thread of the parent: not a second request.
            time.sleep(ORPHAN_CHECK_S)
            if is_orphan(os.environ):
                return
            log.error(
                "second signal %s: exiting without draining, which cuts open requests", signal.Signals(number).name
            )
            leave(EXIT_SECOND_SIGNAL)
        stop_asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


def announce(file: Path, address: str, metrics_port: int = 0) -> None:
    """Write a file with address, pid and metrics port, for the parent process. The file is created atomically.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid(), "metrics_port": metrics_port}))
        partial.rename(file)
    except (OSError, ValueError) as problem:
        raise ConfigError("announce_file", f"{file} cannot be written: {problem}") from None
