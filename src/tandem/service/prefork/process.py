"""One child of a parent that gives its connections away: one life of it, from its start to its exit status.

Owns the process, the channel to it, and what is known of it: its state, its connections, whether it answers. Which
child gets a connection is `distribution`'s business, and what follows its end is `prefork`'s.
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
"""Names the descriptor of the child's end of the channel."""
UNTAKEN_MAX = 4
"""Connections on their way to a child. One that is frozen gets no more than these."""

LATE_S = 0.1
"""A child that has let a connection lie for so long gets another one only where all others have too."""


class Kind(StrEnum):
    """What a message is."""

    # To the child.
    BEGIN = "begin"
    """The first one: the child's identity and settings."""
    PING = "ping"
    """Answer with a report."""
    CONNECTION = "connection"
    """Brings one."""
    RELEASE = "release"
    """Let clients of so many connections connect anew."""
    DRAIN = "drain"
    """Take no more requests, and finish those that are open."""
    STOP = "stop"
    """End."""
    ANSWER = "answer"
    """To a question."""
    # From the child.
    STATE = "state"
    """Its own."""
    REPORT = "report"
    """Connections taken and ended since its start, and calls that are open."""
    ASKED = "asked"
    """It has got a signal."""
    DRAINED = "drained"
    """No request is open any more, or the time for them is over."""
    FAILED = "failed"
    """It cannot start; says why."""
    QUESTION = "question"
    """Wants to know what only the parent knows."""


class State(Enum):
    """Where a child is in its life."""

    STARTING = "starting"
    OPEN = "open"
    """It answers calls, and says that it does not serve yet."""
    SERVING = "serving"
    DRAINING = "draining"
    ENDED = "ended"


class Watcher:
    """Is called with what a child reports. Each method may be left out."""

    def changed(self, child: ChildProcess) -> None:
        """It has come to another state, or has room for connections again."""

    def asked(self, child: ChildProcess) -> None:
        """It has got a signal that asks for its end."""

    def question(self, child: ChildProcess, message: Message) -> None:
        """It wants to know something."""


class ChildProcess:
    """One life of one child."""

    def __init__(self, number: int, watcher: Watcher, clock: Clock = monotonic) -> None:
        self.number = number
        self.state = State.STARTING
        self.is_silent = False
        """It has not answered for long; set by the parent."""
        self.silent_s = 0.0
        self.has_spoken = False
        """Whether it has sent anything since the parent last looked."""
        self.has_served = False
        self.failure: Message | None = None
        """Why it could not start, as it said itself."""
        self.drained: bool | None = None
        """Whether all its requests ended within the bound of its drain; None: it has not drained."""
        self.call_count = 0
        """Calls that are open on it, as of its last report."""
        self.given_number = 0
        self._watcher = watcher
        self._process: asyncio.subprocess.Process | None = None
        self._channel: ControlChannel | None = None
        self._clock = clock
        self._untaken: deque[tuple[socket.socket, float]] = deque()
        """Connections on their way to it, and when they were given."""
        self._given_count = 0
        self._taken_count = 0
        self._ended_count = 0

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none yet."""
        return None if self._process is None else self._process.pid

    @property
    def connection_count(self) -> int:
        """Connections that it has, those on the way to it among them."""
        return self._given_count - self._ended_count

    @property
    def is_late(self) -> bool:
        """Whether it has let a connection lie: it is busy, or frozen."""
        return bool(self._untaken) and self._clock() - self._untaken[0][1] > LATE_S

    @property
    def can_take(self) -> bool:
        """Whether it can be given a connection now."""
        return (
            self.state in (State.OPEN, State.SERVING, State.DRAINING)
            and not self.is_silent
            and len(self._untaken) < UNTAKEN_MAX
            and self._channel is not None
            and not self._channel.is_backed_up
        )

    async def start(self, command: Sequence[str], begin: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Start the process with these variables besides those of this one, and send it its identity."""
        own, its = socket.socketpair()
        ties = {parent_death.VARIABLE: str(os.getpid()), CONTROL_VARIABLE: str(its.fileno())}
        channel = self._channel = ControlChannel(own)
        with its:
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(its.fileno(),),
                    env={**os.environ, **environment, **ties},
                )
            )
            # A cancellation waits: a process without an owner would never be ended.
            try:
                self._process = await asyncio.shield(starting)
            except asyncio.CancelledError:
                self._process = await starting
                self.kill()
                raise
            except BaseException:
                channel.close()
                raise
        channel.begin(self._on_message, lambda: None)
        channel.send(Kind.BEGIN, **begin)

    def give(self, connection: socket.socket, number: int) -> None:
        """Give it a connection, the `number`th of all. It is kept here until the child says that it has it."""
        assert self._channel is not None, "give() before start()"
        self.given_number = number
        self._given_count += 1
        self._untaken.append((connection, self._clock()))
        self._channel.send(Kind.CONNECTION, connection.fileno())

    def send(self, kind: Kind, **fields: Any) -> None:
        """Send it a message; harmless after its end."""
        if self._channel is not None:
            self._channel.send(kind, **fields)

    def ping(self) -> None:
        """Have it report, unless it has not even read what it was sent before."""
        if self._channel is not None and not self._channel.is_backed_up:
            self._channel.send(Kind.PING)

    async def wait_ended(self) -> int:
        """Return its exit status when it has ended; negative: by that signal."""
        assert self._process is not None, "wait_ended() before start()"
        status = await self._process.wait()
        if self._channel is not None and not self._channel.is_closed:
            self._channel.read_rest()
            self._channel.close()
        self._enter(State.ENDED)
        return status

    def take_back(self) -> list[socket.socket]:
        """Connections that it was given and has never taken. After its end only: then no process has them."""
        untaken, self._untaken = self._untaken, deque()
        return [connection for connection, _ in untaken]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; harmless after its end."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once; harmless after its end."""
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
            # The child's own descriptor keeps it open.
            self._untaken.popleft()[0].close()
        self._ended_count, self.call_count = message["ended"], message["calls"]
        self._watcher.changed(self)

    def _enter(self, state: State) -> None:
        if self.state is not state:
            self.state = state
            self._watcher.changed(self)
