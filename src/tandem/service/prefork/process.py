"""One child process as its parent sees it, from its start to its exit status.

Owns the process, the channel to it, and its reported state and connections. `distribution` chooses the child for a
connection, `parent` restarts children.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum, StrEnum
from typing import Any

from tandem.clock import Clock, monotonic
from tandem.service import parent_death
from tandem.service.prefork.control_channel import KIND, ControlChannel, Message

log = logging.getLogger(__name__)

CONTROL_VARIABLE = "TANDEM_PREFORK_FD"
"""Environment variable with the descriptor of the child's end of the channel."""
UNTAKEN_MAX = 4
"""Maximum number of unconfirmed connections of a child, which bounds what a frozen child gets."""

LATE_S = 0.1
"""A child that has not confirmed a connection for this long gets another one only if all others are late too."""


class Kind(StrEnum):
    """Message types."""

    # Parent to child.
    BEGIN = "begin"
    """The first one: the child's identity and settings."""
    PING = "ping"
    """Requests a report."""
    CONNECTION = "connection"
    """Carries a connection."""
    RELEASE = "release"
    """Close this many connections gracefully, so that their clients reconnect."""
    DRAIN = "drain"
    """Accept no more requests, and finish the open ones."""
    STOP = "stop"
    """Exit."""
    ANSWER = "answer"
    """Response to a QUESTION."""
    # Child to parent.
    STATE = "state"
    """The child's new state."""
    REPORT = "report"
    """Connections accepted and closed since its start, and open calls."""
    ASKED = "asked"
    """The child received a signal to stop."""
    DRAINED = "drained"
    """No request is open, or the drain timed out."""
    FAILED = "failed"
    """The start failed; contains the reason."""
    QUESTION = "question"
    """A request for data that only the parent has."""


class State(Enum):
    """Lifecycle state of a child."""

    STARTING = "starting"
    OPEN = "open"
    """Accepts calls; its health is not SERVING yet."""
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


class Watcher:
    """Callbacks for a child's reports. Each method is optional."""

    def changed(self, child: ChildProcess) -> None:
        """Its state has changed, or it can take connections again."""

    def asked(self, child: ChildProcess) -> None:
        """It received a signal to stop."""

    def question(self, child: ChildProcess, message: Message) -> None:
        """It sent a request that needs a response."""


class ChildProcess:
    """One run of one child. `start` makes one."""

    def __init__(
        self,
        number: int,
        watcher: Watcher,
        process: asyncio.subprocess.Process,
        channel: ControlChannel,
        clock: Clock = monotonic,
    ) -> None:
        self.number = number
        self.state = State.STARTING
        self.is_silent = False
        """Whether it has not responded for SILENT_S; set by the parent."""
        self.silent_s = 0.0
        self.has_spoken = False
        """Whether it has sent a message since the last liveness check."""
        self.has_served = False
        self.failure: Message | None = None
        """Its FAILED message, if its start failed."""
        self.drained: bool | None = None
        """Whether all its requests finished within the drain timeout; None: it has not drained."""
        self.call_count = 0
        """Its open calls, as of its last report."""
        self.given_number = 0
        self._watcher = watcher
        self._process = process
        self._channel = channel
        self._clock = clock
        self._untaken: deque[tuple[socket.socket, float]] = deque()
        """Connections sent to it but not confirmed, and when they were sent."""
        self._given_count = 0
        self._taken_count = 0
        self._ended_count = 0

    @classmethod
    async def start(
        cls,
        number: int,
        watcher: Watcher,
        command: Sequence[str],
        begin: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> ChildProcess:
        """Start the process with additional environment variables, and send the BEGIN message.

        Raises:
            OSError: it cannot be started.
        """
        own, its = socket.socketpair()
        ties = {parent_death.VARIABLE: str(os.getpid()), CONTROL_VARIABLE: str(its.fileno())}
        channel = ControlChannel(own)
        with its:
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(its.fileno(),),
                    env={**os.environ, **environment, **ties},
                )
            )
            try:
                process = await asyncio.shield(starting)
            except BaseException as problem:  # whatever fails, the channel has no other owner yet
                channel.close()
                if isinstance(problem, asyncio.CancelledError):
                    # A cancellation waits for the start: an unowned process would never be stopped.
                    await _kill(await starting)
                raise
        child = cls(number, watcher, process, channel)
        channel.begin(child._on_message, lambda: None)
        channel.send(Kind.BEGIN, **begin)
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def connection_count(self) -> int:
        """Its connections, including unconfirmed ones."""
        return self._given_count - self._ended_count

    @property
    def is_late(self) -> bool:
        """Whether a connection is unconfirmed for more than LATE_S: the child is busy, or frozen."""
        return bool(self._untaken) and self._clock() - self._untaken[0][1] > LATE_S

    @property
    def can_take(self) -> bool:
        """Whether a connection can be sent to it now."""
        return (
            self.state in (State.OPEN, State.SERVING, State.DRAINING)
            and not self.is_silent
            and len(self._untaken) < UNTAKEN_MAX
            and not self._channel.is_backed_up
        )

    def give(self, connection: socket.socket, number: int) -> None:
        """Send it a connection, the `number`th of all. The parent keeps it open until the child confirms it."""
        self.given_number = number
        self._given_count += 1
        self._untaken.append((connection, self._clock()))
        self._channel.send(Kind.CONNECTION, connection.fileno())

    def send(self, kind: Kind, **fields: Any) -> None:
        """Send it a message; does nothing after its exit."""
        self._channel.send(kind, **fields)

    def ping(self) -> None:
        """Request a report, unless earlier messages are still unread."""
        if not self._channel.is_backed_up:
            self._channel.send(Kind.PING)

    async def wait_ended(self) -> int:
        """Return its exit status when it has exited; negative: killed by that signal."""
        status = await self._process.wait()
        if not self._channel.is_closed:
            self._channel.read_rest()
            self._channel.close()
        self._enter(State.ENDED)
        return status

    def take_back(self) -> list[socket.socket]:
        """Return connections that it never confirmed. Call only after its exit: then no process has them."""
        untaken, self._untaken = self._untaken, deque()
        return [connection for connection, _ in untaken]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; does nothing after its exit."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it; does nothing after its exit."""
        self.signal(signal.SIGKILL)

    def _on_message(self, message: Message, descriptor: int | None) -> None:
        self.has_spoken = True
        kind = message[KIND]
        if kind == Kind.REPORT:
            self._note_report(message)
        elif kind == Kind.STATE:
            self._enter(State(message["state"]))
        elif kind == Kind.ASKED:
            self._watcher.asked(self)
        elif kind == Kind.DRAINED:
            self.drained = message["is_clean"]
            self._watcher.changed(self)
        elif kind == Kind.FAILED:
            self.failure = message
        elif kind == Kind.QUESTION:
            self._watcher.question(self, message)

    def _note_report(self, message: Message) -> None:
        while self._taken_count < message["taken"]:
            self._taken_count += 1
            # The child has its own descriptor now, which keeps the connection open.
            self._untaken.popleft()[0].close()
        self._ended_count, self.call_count = message["ended"], message["calls"]
        self._watcher.changed(self)

    def _enter(self, state: State) -> None:
        if self.state is not state:
            self.state = state
            self._watcher.changed(self)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process that has no owner, and wait for its exit."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
