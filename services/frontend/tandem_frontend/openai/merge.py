"""The choices of one request merged into one response: each choice is a generation that pushes chunks into its sink.

Owns the order in which entries are sent and the waiting for parsers. A choice without a parser waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import RequestAborted

if TYPE_CHECKING:
    from tandem_frontend.openai.handler import ApiResponse


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
