"""The child's side of `prefork`: its identity, its connections, and when it drains and stops.

Owns the channel to the parent. When the parent dies, the child drains. The service decides what is served, and how.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from tandem.errors import StartError
from tandem.service.prefork.control_channel import KIND, ControlChannel, Message
from tandem.service.prefork.process import CONTROL_VARIABLE, Kind, State

log = logging.getLogger(__name__)

REPORT_S = 0.02
"""Ends of connections within this time are reported together."""
ANSWER_TIMEOUT_S = 1.0


class Serving(Protocol):
    """The server of the connections: `tandem.rpc.http2.server.Http2RpcServer`."""

    on_connection_end: Callable[[], None]

    @property
    def connection_count(self) -> int:
        """Number of open connections."""
        ...

    @property
    def open_call_count(self) -> int:
        """Number of open calls."""
        ...

    def serve_socket(self, connection: socket.socket) -> None:
        """Serve one connection."""
        ...

    def release(self, count: int) -> None:
        """Close `count` connections gracefully, so that their clients reconnect."""
        ...


def find_parent(environ: MutableMapping[str, str]) -> ParentLink | None:
    """The link to the parent that started this process as a child; None: it has no parent."""
    descriptor = environ.pop(CONTROL_VARIABLE, None)
    if descriptor is None:
        return None
    # Processes started by this one must not keep the channel open.
    os.set_inheritable(int(descriptor), False)
    return ParentLink(ControlChannel(socket.socket(fileno=int(descriptor))))


class ParentLink:
    """The link to the parent. Call `wait_begin` first; the event loop takes over with `open`."""

    def __init__(self, channel: ControlChannel) -> None:
        self._channel = channel
        self._serving: Serving | None = None
        self._taken_count = 0
        self._ended_count = 0
        self._reporting: asyncio.TimerHandle | None = None
        self._state = State.STARTING
        self._drain = asyncio.Event()
        self._stop = asyncio.Event()
        self._has_drained = False
        self._answers: list[asyncio.Future[Message]] = []

    # Before there is an event loop.

    def wait_begin(self) -> Message:
        """Wait for the parent's first message.

        Raises:
            StartError: the parent is dead.
        """
        first = self._channel.receive_blocking()
        if first is None:
            raise StartError("the parent process has exited")
        message, _ = first
        return message

    def fail(self, problem: StartError) -> None:
        """Report why this process cannot start; the parent raises that error."""
        key = problem.metadata.get("key", "")
        sentence = str(problem).removeprefix(f"{key}: ") if key else str(problem)
        try:
            self._channel.send_blocking(Kind.FAILED, key=key, sentence=sentence)
        except OSError:
            log.error("%s", problem)

    # On the event loop.

    def open(self, serving: Serving) -> None:
        """Start to serve connections and to handle the parent's messages."""
        self._serving = serving
        serving.on_connection_end = self._report_soon
        self._channel.begin(self._on_message, self._on_parent_gone)
        self.enter(State.OPEN)

    def enter(self, state: State) -> None:
        """Report a new state of this process."""
        if state is not self._state:
            self._state = state
            self._channel.send(Kind.STATE, state=state.value)

    async def wait_asked(self) -> None:
        """Return when this process must drain."""
        await self._drain.wait()

    async def agree_on_drain(self) -> None:
        """Report to the parent that this process got a signal; return when the parent starts the drain, or is dead."""
        if not self._drain.is_set():
            self._channel.send(Kind.ASKED)
            await self._drain.wait()

    def report_drained(self, *, is_clean: bool) -> None:
        """Report that the drain is over, and whether all requests finished within its timeout."""
        self._has_drained = True
        self._channel.send(Kind.DRAINED, is_clean=is_clean)
        if self._channel.is_closed:
            self._stop.set()

    async def wait_stop(self) -> None:
        """Return when this process may exit: on the parent's message, or after the drain if the parent is dead."""
        await self._stop.wait()

    async def ask(self, **question: Any) -> Message | None:
        """Send a request to the parent and return its response; None: no response within ANSWER_TIMEOUT_S."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if self._channel.is_closed:
            return None
        self._answers.append(answer)
        self._channel.send(Kind.QUESTION, **question)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer or None
        except TimeoutError:
            return None

    def _on_message(self, message: Message, descriptor: int | None) -> None:
        kind = message[KIND]
        if kind == Kind.CONNECTION:
            assert descriptor is not None, "a CONNECTION message carries a descriptor"
            self._take(descriptor)
        elif kind == Kind.PING:
            self._report()
        elif kind == Kind.RELEASE:
            assert self._serving is not None, "it is open"
            self._serving.release(message["count"])
        elif kind == Kind.DRAIN:
            self._drain.set()
        elif kind == Kind.STOP:
            self._drain.set()
            self._stop.set()
        elif kind == Kind.ANSWER:
            # Responses come in the order of the requests.
            answer = self._answers.pop(0)
            if not answer.done():
                answer.set_result(message)

    def _take(self, descriptor: int) -> None:
        assert self._serving is not None, "it is open"
        self._taken_count += 1
        # Reported before the first byte is served: the parent redistributes unreported connections of a dead child.
        self._report(begins=1)
        self._serving.serve_socket(socket.socket(fileno=descriptor))

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self, begins: int = 0) -> None:
        """`begins`: number of connections that are about to be served."""
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        serving = self._serving
        assert serving is not None, "it is open"
        # max(): between its handshake and its first use a connection is counted twice for a moment.
        self._ended_count = max(self._ended_count, self._taken_count - begins - serving.connection_count)
        self._channel.send(Kind.REPORT, taken=self._taken_count, ended=self._ended_count, calls=serving.open_call_count)

    def _on_parent_gone(self) -> None:
        log.error(
            "the parent of this process has exited, and it alone accepts connections: finishing open requests, then "
            "stopping; the parent's last log lines say why"
        )
        self._drain.set()
        if self._has_drained:
            self._stop.set()
        for answer in self._answers:
            if not answer.done():
                answer.set_result({})
