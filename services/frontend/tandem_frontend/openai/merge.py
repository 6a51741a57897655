"""The choices of a request on their way into one answer: each is a generation of its own that pushes into it.

Owns the order in which entries leave and the waiting for parsers. A choice without a parser waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import RequestAborted
from tandem_frontend.openai import response
from tandem_frontend.response.error_body import last_event
from tandem_frontend.response.writers import Call

if TYPE_CHECKING:
    from tandem_frontend.openai.handler import Answer


class Entries:
    """Where the entries of all choices go: nowhere, because the whole is put together at the end."""

    @property
    def is_writable(self) -> bool:
        """False while the client does not read what was sent."""
        return True

    def on_writable(self, callback: Callable[[], None]) -> None:
        """One more that is called each time it becomes writable again."""

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """More entries of `choices`."""


class EventStream(Entries):
    """Each entry as a server-sent event of its own, as OpenAI streams them."""

    def __init__(self, call: Call, head: dict[str, Any], *, with_usage: bool) -> None:
        """`head` is what every event begins with; with usage every event has that field, the last one with a value."""
        self._call = call
        self._head = head
        self._with_usage = with_usage
        begin, end = response.around_choice(head, {"usage": None} if with_usage else {})
        self._begin, self._end = begin, end
        self._callbacks: list[Callable[[], None]] = []
        self.has_begun = False

    @property
    def is_writable(self) -> bool:
        """See `Entries`."""
        return self._call.writable

    def on_writable(self, callback: Callable[[], None]) -> None:
        """See `Entries`."""
        self._callbacks.append(callback)
        self._call.on_writable(self._tell_writable)

    def add(self, choices: Sequence[dict[str, Any]]) -> None:
        """See `Entries`."""
        for choice in choices:
            self._send(self._begin + response.to_json(choice) + self._end)

    def end(self, usage: dict[str, Any]) -> None:
        """Every choice has ended."""
        if self._with_usage:
            self._send(response.event({**self._head, "choices": [], "usage": usage}))
        self._send(response.DONE)

    def fail(self, problem: Exception) -> None:
        """The answer broke after its first event."""
        self._send(response.event(last_event(problem)))

    def _send(self, data: bytes) -> None:
        # The edge takes the content type from the first message.
        self._call.send(HttpBody(data=data) if self.has_begun else HttpBody(content_type=response.EVENTS, data=data))
        self.has_begun = True

    def _tell_writable(self) -> None:
        for callback in self._callbacks:
            callback()


class ChoiceAnswer:
    """One choice: a `generation.Answer`. While its parser works it takes no chunk, so that text gathers."""

    def __init__(self, number: int, answer: Answer, entries: Entries, group: asyncio.TaskGroup | None) -> None:
        """`group` owns the waiting for the parser; it is there where the choice has one."""
        self._number = number
        self._answer = answer
        self._choice = answer.choices[number]
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
        """See `generation.Answer`: OpenAI's answers say nothing of it."""

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """See `relay.Outlet`."""
        if not self._choice.parses:
            self._entries.add(self._choice.take(chunk))
            return
        self._unparsed.append(chunk)
        if self._parsing is None:
            assert self._group is not None, "a choice with a parser runs in a group"
            self._parsing = self._group.create_task(self._parse(), name=f"parse-{self._number}")

    async def finish(self, finish: pb.GenerateFinish) -> None:
        """See `generation.Answer`."""
        if self._parsing is not None:
            await self._parsing
        if finish.reason == generation_pb2.FINISH_REASON_ABORTED:
            raise RequestAborted("the generation was aborted")
        self._answer.usage.add(self._number, finish.usage)
        self._entries.add(await self._choice.end(finish))

    async def _parse(self) -> None:
        while self._unparsed:
            self._entries.add(await self._choice.parse(self._unparsed.pop(0)))
        self._parsing = None
        if self._callback is not None:
            self._callback()
