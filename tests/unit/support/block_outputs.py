"""Runs a door's output over scripted parser deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tandem_frontend.openai.blocks import BlockChoice

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.output_parsers import Delta, ToolCallArguments, ToolCallStart

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
CALL = (ToolCallStart(0, "call_0", "look"), ToolCallArguments(0, '{"a"'), ToolCallArguments(0, ": 1}"))
SECOND = (ToolCallStart(1, "call_1", "wait"), ToolCallArguments(1, "{}"))
USAGE = generation_pb2.Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=16)


class Scripted:
    """A parser that returns scripted deltas."""

    def __init__(self, feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = ()) -> None:
        self._feeds = list(feeds)
        self._rest = rest

    async def feed(self, text: str) -> list[Delta]:
        return list(self._feeds.pop(0))

    async def close(self, *, complete: bool) -> list[Delta]:
        return list(self._rest)


async def count_words(text: str) -> int:
    """Counts tokens of a text."""
    return len(text.split())


async def outputs(
    make: Callable[[Any], BlockChoice],
    feeds: Sequence[Sequence[Delta]],
    rest: Sequence[Delta] = (),
    *,
    reason: Any = STOP,
    stop: str | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The streamed events, and the whole response. `make` gets the parser's stream."""
    choice = make(Scripted(feeds, rest))
    events: list[dict[str, Any]] = []
    for _ in feeds:
        events += await choice.parse(pb.GenerateChunk(text="x"))
    finish = pb.GenerateFinish(reason=reason, usage=USAGE)
    if stop is not None:
        finish.matched_stop.stop = stop
    events += await choice.end(finish)
    return events, choice.as_json()
