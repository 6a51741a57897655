"""The life of a service process, from its arguments to its exit status.

    parse -> start -> announce -> (a signal, or a failure) -> drain -> stop -> exit status

A signal before it serves ends it at once: there is nothing to drain.

Exit statuses: 0 clean; 1 failed to start, failed while serving, or a drain bound was hit; 2 a setting is wrong;
70 a second signal cut the drain short.
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
"""Not all that some systems would give: there are programs that close every number up to the limit."""


def allow_many() -> None:
    """Raise the soft limit, as far as the hard one allows; never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS calls its hard limit infinite and may refuse all the same.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


log = logging.getLogger(__name__)

ABANDON_TIMEOUT_S = 1.5
"""Most time for a service to free what it has before it serves; an engine's imports cannot be interrupted."""

ORPHAN_LOOK_S = 0.05
"""By then every thread of a parent that dies is gone."""


class Service(Protocol):
    """What a process runs. Only `app.py` of each service knows what start and stop mean, and in which order."""

    @property
    def address(self) -> str:
        """host:port it serves at, once started."""
        ...

    @property
    def metrics_port(self) -> int:
        """Where it is scraped, once started; 0: nowhere."""
        ...

    async def start(self) -> None:
        """Return when it serves."""
        ...

    async def drain(self) -> bool:
        """Announce the end, finish what runs. Returns whether everything finished within its bound."""
        ...

    async def stop(self) -> None:
        """Free everything. Called once, after `drain`, and also when `start` failed."""
        ...

    async def wait_finished(self) -> str | None:
        """Return one sentence when it cannot go on, or None when it was asked over the wire to end."""
        ...


C = TypeVar("C", bound=ServiceConfig)


def main(program: str, config_type: type[C], build: Callable[[C], Service]) -> int:
    """Run a service until it ends; returns the exit status. `build` makes the service, without I/O."""
    try:
        config = configuration.load(config_type, program, sys.argv[1:], os.environ)
        return run(program, config, build)
    except StartError as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return problem.exit_status


def run(program: str, config: C, build: Callable[[C], Service], *, process: int | None = None) -> int:
    """Run a service with these settings until it ends; returns the exit status.

    `process` is its number among the processes of one service, for the log.

    Raises:
        StartError: it cannot start.
    """
    logs.set_up(config.log_level, config.log_format, program, process)
    allow_many()
    log.info("%s settings %s", program, configuration.effective(config))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(build(config), config.announce_file))


def leave(exit_status: int) -> NoReturn:
    """End the process without the interpreter's own end.

    Libraries leave threads behind in a worker's process (gRPC's poller, SGLang's), and the interpreter trips over them
    after the sentence that counts has been printed. Everything of ours is stopped by now; what is not is killed.
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
    """Processes started by this one that have not been waited for; none where the kernel does not say."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for file in lists for pid in file.read_text().split()]


async def serve(service: Service, announce_file: Path | None = None) -> int:
    """Start, wait for a signal or the service's own end, drain, stop. Returns the exit status."""
    stop_asked = asyncio.Event()
    with_signals(stop_asked)
    if not await _start(service, stop_asked):
        log.info("asked to end before it served")
        return 0
    try:
        # An engine may have installed handlers of its own while it started.
        with_signals(stop_asked)
        # Modules and what the start has made live as long as the process. Without this the garbage collector walks all
        # of it again and again, 20 ms in a frontend and longer beside an engine, and every stream stands still.
        gc.freeze()
        if announce_file is not None:
            announce(announce_file, service.address, service.metrics_port)
        failure = await _wait_end(service, stop_asked)
        if failure is not None:
            log.error("cannot go on: %s", failure)
            return 1
        return 0 if await service.drain() else 1
    finally:
        await service.stop()


async def _start(service: Service, stop_asked: asyncio.Event) -> bool:
    """Whether it started; False when a signal came first, and it has freed everything."""
    starting = asyncio.ensure_future(service.start())
    asked = asyncio.ensure_future(stop_asked.wait())
    await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not starting.done():
        await _abandon(service, starting)
        return False
    try:
        await starting
    except BaseException:
        await service.stop()
        raise
    return True


async def _abandon(service: Service, starting: asyncio.Future[None]) -> None:
    """Free what a service has got so far; what cannot be freed in time goes with the process."""
    try:
        async with asyncio.timeout(ABANDON_TIMEOUT_S):
            starting.cancel()
            await asyncio.wait({starting})
            await service.stop()
    except TimeoutError:
        log.info("ended while it started")
        leave(0)


async def _wait_end(service: Service, stop_asked: asyncio.Event) -> str | None:
    """None: it was asked to end. A sentence: it cannot go on."""
    finished = asyncio.ensure_future(service.wait_finished())
    asked = asyncio.ensure_future(stop_asked.wait())
    await asyncio.wait({finished, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if finished.done():
        return await finished
    finished.cancel()
    return None


def with_signals(stop_asked: asyncio.Event) -> None:
    """SIGTERM and SIGINT ask for the end; a second one ends the process at once."""

    def handle(number: int) -> None:
        if stop_asked.is_set():
            # The kernel tells of a parent's death once for each of its threads.
            time.sleep(ORPHAN_LOOK_S)
            if is_orphan(os.environ):
                return
            log.error("second signal %s: ending without draining", signal.Signals(number).name)
            leave(EXIT_SECOND_SIGNAL)
        stop_asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


def announce(file: Path, address: str, metrics_port: int = 0) -> None:
    """Tell whoever started this process where it serves and is scraped. The file appears whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"address": address, "pid": os.getpid(), "metrics_port": metrics_port}))
        partial.rename(file)
    except (OSError, ValueError) as problem:
        raise ConfigError("announce_file", f"{file} cannot be written: {problem}") from None
