"""The choices of one request merged into one response: each choice is a generation that pushes chunks into its sink.

Owns the order in which entries are sent and the waiting for parsers. A choice without a parser waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import RequestAborted
from tandem_frontend.openai import response
from tandem_frontend.response.error_body import last_event
from tandem_frontend.response.sse import COMMENT
from tandem_frontend.response.writers import Call

if TYPE_CHECKING:
    from tandem_frontend.openai.handler import ApiResponse
    from tandem_frontend.openai.response import UsageSum


class EntrySink:
    """Takes the entries of all choices. This one drops them: a response that is not streamed is built at the end."""

    repeats_usage = False
    """Whether entries are sent with the usage so far, which must then be counted."""

    @property
    def is_writable(self) -> bool:
        """False while the client reads too slowly and sent data is buffered."""
        return True

    def on_writable(self, callback: Callable[[], None]) -> None:
        """Add a callback, called each time the sink becomes writable again."""

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """Add entries of `choices`."""


class EventStream(EntrySink):
    """Sends each entry as a server-sent event of its own, as OpenAI does."""

    def __init__(
        self, call: Call, head: dict[str, Any], *, with_usage: bool, running_usage: UsageSum | None = None
    ) -> None:
        """`head`: the first fields of every event. With usage, each event has the field and the last one a value.

        With `running_usage`, every event has the usage so far.
        """
        self._call = call
        self._head = head
        self._with_usage = with_usage
        self._running_usage = running_usage
        self.repeats_usage = running_usage is not None
        self._loop = asyncio.get_running_loop()
        self._sent_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        begin, end = response.around_choice(head, {"usage": None} if with_usage else {})
        self._begin, self._end = begin, end
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

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """See `EntrySink`."""
        for choice in choices:
            if self._running_usage is None:
                self._send(self._begin + response.to_json(choice) + self._end)
            else:
                self._send(response.event({**self._head, "choices": [choice], "usage": self._running_usage.so_far()}))

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

    def end(self, usage: dict[str, Any]) -> None:
        """Send the last events, after every choice has ended."""
        if self._with_usage:
            self._send(response.event({**self._head, "choices": [], "usage": usage}))
        self._send(response.DONE)

    def fail(self, problem: Exception) -> None:
        """Send an error event as the last one; for failures after the first event."""
        # Without [DONE]: SDKs take it as the end of a complete response.
        self._send(response.event(last_event(problem)))

    def _send(self, data: bytes) -> None:
        # Envoy's transcoder takes the content type from the first message only.
        self._call.send(HttpBody(data=data) if self.has_begun else HttpBody(content_type=response.EVENTS, data=data))
        self.has_begun = True
        self._sent_s = self._loop.time()

    def _notify_writable(self) -> None:
        for callback in self._callbacks:
            callback()


class ChoiceSink:
    """The `pipeline.Answer` of one choice. Not writable while its parser runs, so that several tokens share a chunk."""

    def __init__(self, number: int, result: ApiResponse, entries: EntrySink, group: asyncio.TaskGroup | None) -> None:
        """`group` owns the parser task; None only for a choice without a parser."""
        self._number = number
        self._result = result
        self._choice = result.choices[number]
        self._entries = entries
        self._group = group
        self._unparsed: list[pb.GenerateChunk] = []
        self._parsing: asyncio.Task[None] | None = None
        self._callback: Callable[[], None] | None = None

    @property
    def is_writable(self) -> bool:
        """See `relay.Outlet`."""
        return self._parsing is None and self._entries.is_writable

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `relay.Outlet`."""
        self._callback = callback
        self._entries.on_writable(callback)

    def accepted(self, accepted: pb.GenerateAccepted) -> None:
        """See `pipeline.Answer`. OpenAI's responses have no event for it."""
        if self._entries.repeats_usage:
            self._result.usage.begin(self._number, accepted.prompt_tokens)

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        if self._entries.repeats_usage:
            self._result.usage.count(self._number, len(chunk.token_ids))
        if not self._choice.parses:
            self._entries.add(self._choice.take(chunk))
            return
        self._unparsed.append(chunk)
        if self._parsing is None:
            assert self._group is not None, "a choice with a parser runs in a group"
            self._parsing = self._group.create_task(self._parse(), name=f"parse-{self._number}")

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `pipeline.Answer`."""
        # The parser task may still work on earlier chunks; their entries come before the finish.
        if self._parsing is not None:
            await self._parsing
        # OpenAI has no finish reason for it, and "stop" would present a cut text as a whole one.
        if finish.reason == generation_pb2.FINISH_REASON_ABORTED:
            raise RequestAborted("the generation was aborted")
        self._result.usage.add(self._number, finish.usage)
        self._entries.add(await self._choice.end(finish))

    async def _parse(self) -> None:
        # One task parses all chunks: the parser must get them in order.
        while self._unparsed:
            self._entries.add(await self._choice.parse(self._unparsed.pop(0)))
        self._parsing = None
        if self._callback is not None:
            self._callback()
