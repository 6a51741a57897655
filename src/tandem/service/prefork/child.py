"""The child's side of `prefork`: its identity, the connections it is given, and when it drains and ends.

Owns the channel to the parent. A parent that is gone asks for a drain, as the signal of its death does. What is served,
and how, is the service's.
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
"""Ends of connections within it are reported together."""
ANSWER_TIMEOUT_S = 1.0


class Serving(Protocol):
    """What the connections are given to: `tandem.rpc.http2.server.Http2RpcServer`."""

    on_connection_end: Callable[[], None]

    @property
    def connection_count(self) -> int:
        """Connections that are open."""
        ...

    @property
    def open_call_count(self) -> int:
        """Calls that are open."""
        ...

    def serve_socket(self, connection: socket.socket) -> None:
        """Serve one."""
        ...

    def release(self, count: int) -> None:
        """Let clients of so many connections connect anew."""
        ...


def find_parent(environ: MutableMapping[str, str]) -> ParentLink | None:
    """The parent that has started this process as one of its children; None: it was started by itself."""
    descriptor = environ.pop(CONTROL_VARIABLE, None)
    if descriptor is None:
        return None
    # Whatever this process starts must not hold the channel open.
    os.set_inheritable(int(descriptor), False)
    return ParentLink(ControlChannel(socket.socket(fileno=int(descriptor))))


class ParentLink:
    """The way to the parent. `wait_begin` first; the event loop takes over with `open`."""

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
        """What the parent says first.

        Raises:
            StartError: it has gone.
        """
        first = self._channel.receive_blocking()
        if first is None:
            raise StartError("the process that started this one has gone")
        message, _ = first
        return message

    def fail(self, problem: StartError) -> None:
        """Report why this process cannot start; the parent raises it."""
        key = problem.metadata.get("key", "")
        sentence = str(problem).removeprefix(f"{key}: ") if key else str(problem)
        try:
            self._channel.send_blocking(Kind.FAILED, key=key, sentence=sentence)
        except OSError:
            log.error("%s", problem)

    # On the event loop.

    def open(self, serving: Serving) -> None:
        """Serve what comes from now on, and do what the parent says."""
        self._serving = serving
        serving.on_connection_end = self._report_soon
        self._channel.begin(self._on_message, self._on_parent_gone)
        self.enter(State.OPEN)

    def enter(self, state: State) -> None:
        """Report that this process has come to another state."""
        if state is not self._state:
            self._state = state
            self._channel.send(Kind.STATE, state=state.value)

    async def wait_asked(self) -> None:
        """Return when the parent wants this process to drain."""
        await self._drain.wait()

    async def agree_on_drain(self) -> None:
        """Have the parent know that this process was asked by a signal; return when it agrees, or is gone."""
        if not self._drain.is_set():
            self._channel.send(Kind.ASKED)
            await self._drain.wait()

    def report_drained(self, *, is_clean: bool) -> None:
        """Report that the drain is over, and whether all requests ended within its bound."""
        self._has_drained = True
        self._channel.send(Kind.DRAINED, is_clean=is_clean)
        if self._channel.is_closed:
            self._stop.set()

    async def wait_stop(self) -> None:
        """Return when this process may end; where the parent is gone, when it has drained."""
        await self._stop.wait()

    async def ask(self, **question: Any) -> Message | None:
        """Ask the parent something; None: it does not answer."""
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
            assert descriptor is not None, "such a message brings one"
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
            # They come in the order of the questions.
            answer = self._answers.pop(0)
            if not answer.done():
                answer.set_result(message)

    def _take(self, descriptor: int) -> None:
        assert self._serving is not None, "it is open"
        self._taken_count += 1
        # Before a byte is answered: what the parent has not heard of, it gives to another when this process dies.
        self._report(begins=1)
        self._serving.serve_socket(socket.socket(fileno=descriptor))

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self, begins: int = 0) -> None:
        """`begins`: connections that are about to be served."""
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
        serving = self._serving
        assert serving is not None, "it is open"
        # Never less than before: between its handshake and its first use a connection is counted twice for a moment.
        self._ended_count = max(self._ended_count, self._taken_count - begins - serving.connection_count)
        self._channel.send(Kind.REPORT, taken=self._taken_count, ended=self._ended_count, calls=serving.open_call_count)

    def _on_parent_gone(self) -> None:
        log.error("the parent of this process is gone: it finishes what it has and ends")
        self._drain.set()
        if self._has_drained:
            self._stop.set()
        for answer in self._answers:
            if not answer.done():
                answer.set_result({})
