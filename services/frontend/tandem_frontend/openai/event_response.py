"""Responses of server-sent events: what the streams of all APIs share, and those of OpenAI's completions.

Owns the content type of the first event and the comments while nothing is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.api.httpbody_pb2 import HttpBody

from tandem_frontend.openai import response
from tandem_frontend.openai.merge import EntrySink
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.response.error_body import last_event
from tandem_frontend.response.sse import COMMENT
from tandem_frontend.response.writers import Call


class EventResponse(EntrySink):
    """What all streams of OpenAI's and Anthropic's APIs share; `add` is the subclass's."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._sent_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._callbacks: list[Callable[[], None]] = []
        self.has_begun = False

    @property
    def is_writable(self) -> bool:
        """See `EntrySink`."""
        return self._call.writable

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `EntrySink`."""
        self._callbacks.append(callback)
        self._call.on_writable(self._notify_writable)

    def _notify_writable(self) -> None:
        for callback in self._callbacks:
            callback()

    @contextlib.contextmanager
    def kept_alive(self, every_s: float) -> Iterator[None]:
        """Send a comment after each `every_s` seconds without an event: clients and proxies give up silent streams.

        0: never. The first one begins the response: a failure afterwards has no HTTP status of its own any more.
        """
        if every_s:
            self._wait(every_s, every_s)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _wait(self, left_s: float, every_s: float) -> None:
        self._timer = self._loop.call_later(left_s, self._comment, every_s)

    def _comment(self, every_s: float) -> None:
        left_s = self._sent_s + every_s - self._loop.time()
        if left_s <= 0:
            # What waits in a full buffer keeps the connection alive by itself.
            if self._call.writable:
                self._send(COMMENT)
            left_s = every_s
        self._wait(left_s, every_s)

    def _send(self, data: bytes) -> None:
        # Envoy's transcoder takes the content type from the first message only.
        self._call.send(HttpBody(data=data) if self.has_begun else HttpBody(content_type=response.EVENTS, data=data))
        self.has_begun = True
        self._sent_s = self._loop.time()


class EventStream(EventResponse):
    """Sends each entry as an event of its own, as OpenAI does."""

    def __init__(
        self, call: Call, head: dict[str, Any], *, with_usage: bool, running_usage: UsageSum | None = None
    ) -> None:
        """`head`: the first fields of every event. With usage, each event has the field and the last one a value.

        With `running_usage`, every event has the usage so far.
        """
        super().__init__(call)
        self._head = head
        self._with_usage = with_usage
        self._running_usage = running_usage
        self.repeats_usage = running_usage is not None
        self._begin, self._end = response.around_choice(head, {"usage": None} if with_usage else {})

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """See `EntrySink`."""
        for choice in choices:
            if self._running_usage is None:
                self._send(self._begin + response.to_json(choice) + self._end)
            else:
                self._send(response.event({**self._head, "choices": [choice], "usage": self._running_usage.so_far()}))

    def end(self, usage: dict[str, Any]) -> None:
        """Send the last events, after every choice has ended."""
        if self._with_usage:
            self._send(response.event({**self._head, "choices": [], "usage": usage}))
        self._send(response.DONE)

    def fail(self, problem: Exception) -> None:
        """Send an error event as the last one; for failures after the first event."""
        # Without [DONE]: SDKs take it as the end of a complete response.
        self._send(response.event(last_event(problem)))
