"""A service on several processes: a parent that accepts connections, and children that serve them.

    parent: binds the port -> starts the children -> passes each connection to one -> drains and stops them together
    child:  serves its connections; a crash affects only these, and the child is restarted

Owns the children of one parent: their number, restarts, liveness checks, and the order of their stop. Never reads a
byte of a client. The service decides what a child serves and what is reported for the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from tandem.clock import Clock, monotonic
from tandem.errors import ConfigError, StartError
from tandem.service.awake_timers import AwakeTimers
from tandem.service.prefork.control_channel import Message
from tandem.service.prefork.distribution import Accepting, Distributor, releases
from tandem.service.prefork.process import ChildProcess, Kind, State, Watcher
from tandem.service.restart_budget import RestartBudget, RestartPolicy

log = logging.getLogger(__name__)

OTHERS_WITHIN_S = 5.0
"""How much longer the start waits for the other children once one serves, so that the first clients reach all."""
PING_S = 1.0
"""Interval of liveness checks."""
SILENT_S = 10.0
"""A child without a response for this long gets no new connections. Counts only time in which the parent ran."""
SIGNAL_GRACE_S = 0.5
"""Delay before a signalled child drains alone: a signal to the whole group may reach children before the parent."""
DRAIN_MARGIN_S = 5.0
"""Added to a child's own drain timeout."""
STOP_TIMEOUT_S = 15.0
"""Longer than a server waits for handlers that do not finish."""
ABANDON_TIMEOUT_S = 1.0
"""Stop timeout of a child that does not serve yet."""


class Prefork(Watcher):
    """The children of one parent, from `start` to `stop`."""

    def __init__(
        self,
        command: Sequence[str],
        begins: Sequence[Mapping[str, Any]],
        listener: Accepting,
        *,
        drain_s: float,
        environment: Mapping[str, str] | None = None,
        answer: Callable[[Message], Mapping[str, Any]] = lambda message: {},
        on_restart: Callable[[], None] = lambda: None,
        policy: RestartPolicy | None = None,
        clock: Clock = monotonic,
    ) -> None:
        """Starts nothing yet.

        Args:
            command: command line of a child.
            begins: the first message to each child; their number is the number of children.
            listener: the listening socket for clients.
            drain_s: drain timeout of a child.
            environment: environment variables of children besides those of this process.
            answer: returns the response to a child's request.
            on_restart: called before a child that has exited is restarted.
            policy: limit and delays of restarts.
            clock: for that policy.
        """
        self._command = command
        self._begins = begins
        self._drain_s = drain_s
        self._environment = environment or {}
        self._answer = answer
        self._on_restart = on_restart
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._children: dict[int, ChildProcess] = {}
        self._distributor = Distributor(listener, lambda: self._children.values())
        self._timers = AwakeTimers()
        self._keeping: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._has_served = self._is_draining = False
        self._refused: StartError | None = None
        """Why a child could not start, before any child has served."""
        self._given_up: str | None = None

    @property
    def count(self) -> int:
        """Configured number of children."""
        return len(self._begins)

    @property
    def children(self) -> list[ChildProcess]:
        """The current children, including dead ones until they are restarted."""
        return [self._children[number] for number in sorted(self._children)]

    async def start(self) -> None:
        """Return when all children serve, or OTHERS_WITHIN_S after the first one does.

        Raises:
            ConfigError: a child rejected a setting.
            StartError: no child can start.
        """
        self._distributor.begin()
        for number in range(self.count):
            self._keeping.append(asyncio.create_task(self._keep(number), name=f"process-{number}"))
        self._timers.after(PING_S, self._check_liveness)
        while not self._has_served:
            if self._refused is not None:
                raise self._refused
            if self._given_up is not None:
                raise StartError(self._given_up)
            await self._wait_change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OTHERS_WITHIN_S):
                while sum(child.state is State.SERVING for child in self.children) < self.count:
                    await self._wait_change()

    async def wait_given_up(self) -> str:
        """Return the reason when a child has exceeded its restarts; never returns otherwise."""
        while self._given_up is None:
            await self._wait_change()
        return self._given_up

    def begin_drain(self) -> None:
        """Stop restarting children, and stop those that do not serve yet."""
        self._is_draining = True
        for child in self.children:
            if child.state is State.STARTING:
                child.signal(signal.SIGTERM)

    async def drain(self) -> bool:
        """Drain every child. Returns whether all finished their requests within the timeout."""
        self.begin_drain()
        draining = [child for child in self.children if child.state not in (State.STARTING, State.ENDED)]
        for child in draining:
            child.send(Kind.DRAIN)
        try:
            async with asyncio.timeout(self._drain_s + DRAIN_MARGIN_S):
                while any(child.drained is None and child.state is not State.ENDED for child in draining):
                    await self._wait_change()
        except TimeoutError:
            late = [child.number for child in draining if child.drained is None and child.state is not State.ENDED]
            log.error("processes %s did not drain within %g s: stopping them", late, self._drain_s + DRAIN_MARGIN_S)
        return all(child.drained for child in draining)

    async def stop(self) -> None:
        """Stop all children; kill those that do not exit in time. May be called twice, and without a start."""
        self._is_draining = True
        self._timers.close()
        for task in (*self._keeping, *self._tasks):
            task.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        await asyncio.gather(*(self._end(child) for child in self.children))
        self._distributor.close()

    # Events of children: `prefork.process.Watcher`.

    def changed(self, child: ChildProcess) -> None:
        """See `Watcher`."""
        if child.state is State.SERVING and not child.has_served:
            child.has_served = self._has_served = True
            self._rebalance(child)
        elif child.drained is not None and not self._is_draining:
            # It drained after a signal to this child alone, which is restarted.
            child.send(Kind.STOP)
        self._distributor.reevaluate()
        self._wake_waiters()

    def asked(self, child: ChildProcess) -> None:
        """See `Watcher`."""

        async def drain_it() -> None:
            await asyncio.sleep(SIGNAL_GRACE_S)
            if not self._is_draining:
                log.info(
                    "process %d (pid %s) received a signal: draining it, then starting a new one",
                    child.number,
                    child.pid,
                )
                child.send(Kind.DRAIN)

        self._spawn(drain_it())

    def question(self, child: ChildProcess, message: Message) -> None:
        """See `Watcher`."""
        child.send(Kind.ANSWER, **self._answer(message))

    def _rebalance(self, newcomer: ChildProcess) -> None:
        """Release connections of the other children, so that their clients reconnect and reach the new child too."""
        serving = [child for child in self.children if child.state is State.SERVING]
        counts = [child.connection_count for child in serving]
        for child, count in zip(serving, releases(counts, serving.index(newcomer)), strict=True):
            if count:
                child.send(Kind.RELEASE, count=count)

    # Restarts of one child.

    async def _keep(self, number: int) -> None:
        """Start a child, and restart it as often as the policy allows."""
        budget = RestartBudget(self._policy, self._clock)
        while not self._is_draining:
            ended = await self._run(number)
            if ended is None:
                return
            status, who, how = ended
            # Status 0 means that it was asked to stop, which is not a failure: restart it without limit.
            delay_s = self._policy.first_delay_s if status == 0 else budget.take_delay_s()
            if delay_s is None:
                self._given_up = f"process {number} {how}; giving up after {self._policy.count_max} restarts"
                self._wake_waiters()
                return
            if not self._is_draining:
                level = logging.INFO if status == 0 else logging.ERROR
                log.log(level, "%s %s; restarting in %g s", who, how, delay_s)
                self._on_restart()
                await asyncio.sleep(delay_s)

    async def _run(self, number: int) -> tuple[int, str, str] | None:
        """Run one child until its exit; returns its exit status, its name for the log, and how it ended.

        Returns None if it rejected its settings before any child has served: then no restart can help.
        """
        try:
            child = await ChildProcess.start(number, self, self._command, self._begins[number], self._environment)
        except OSError as problem:
            log.error("could not start process %d: %s", number, problem)
            return 1, f"process {number}", "did not start"
        self._children[number] = child
        status = await child.wait_ended()
        untaken = child.take_back()
        if child.failure is not None and not self._has_served:
            self._refused = _as_error(child.failure)
            self._wake_waiters()
            return None
        self._distributor.give_again(untaken)
        return status, f"process {number} (pid {child.pid})", _ending(status, child)

    async def _end(self, child: ChildProcess) -> None:
        if child.state is State.ENDED:
            return
        timeout_s = STOP_TIMEOUT_S
        if child.state is State.STARTING:
            timeout_s = ABANDON_TIMEOUT_S
            child.signal(signal.SIGTERM)
        child.send(Kind.STOP)
        try:
            async with asyncio.timeout(timeout_s):
                await child.wait_ended()
        except TimeoutError:
            log.error("process %d (pid %s) did not exit within %g s: killing it", child.number, child.pid, timeout_s)
            child.kill()
            await child.wait_ended()
        for connection in child.take_back():
            connection.close()

    # Liveness.

    def _check_liveness(self) -> None:
        for child in self.children:
            if child.state in (State.STARTING, State.ENDED):
                continue
            silent_s = 0.0 if child.has_spoken else child.silent_s + PING_S
            child.has_spoken, child.silent_s = False, silent_s
            if child.is_silent is not (silent_s >= SILENT_S):
                child.is_silent = not child.is_silent
                self._log_silence(child)
            child.ping()
        self._timers.after(PING_S, self._check_liveness)

    def _log_silence(self, child: ChildProcess) -> None:
        if child.is_silent:
            log.error(
                "process %d (pid %s) has not responded for %g s: it gets no new connections",
                child.number, child.pid, SILENT_S,
            )  # fmt: skip
        else:
            log.info("process %d (pid %s) responds again: it gets new connections", child.number, child.pid)
            self._distributor.reevaluate()

    # Waiting for changes.

    def _wake_waiters(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait_change(self) -> None:
        await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ending(status: int, child: ChildProcess) -> str:
    if child.failure is not None:
        return f"could not start ({child.failure['sentence']})"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _as_error(failure: Message) -> StartError:
    """A child's start failure as the error that the parent raises."""
    if failure["key"]:
        return ConfigError(failure["key"], failure["sentence"])
    return StartError(failure["sentence"])
