"""Merging the choices of a request: every entry once and in the order of its choice; one failure ends all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

import pytest
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.pipeline import Answer, Generation

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import LegFailed, ParserFailed, RequestAborted

STOP, ABORTED = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_ABORTED


class Source:
    """A scripted generation of numbered chunks."""

    def __init__(
        self, count: int, delay_s: float = 0.0, *, failure: Exception | None = None, reason: Any = STOP
    ) -> None:
        self.count = count
        self.delay_s = delay_s
        self.failure = failure
        self.reason = reason
        self.is_over = False
        self.given = 0
        self.has_begun = asyncio.Event()

    async def generate(self, answer: Answer) -> None:
        try:
            answer.accepted(pb.GenerateAccepted())
            for number in range(self.count):
                await asyncio.sleep(self.delay_s)
                self.given += 1
                self.has_begun.set()
                answer.chunk(pb.GenerateChunk(index=number, text=str(number)))
            if self.failure is not None:
                raise self.failure
            await answer.finish(pb.GenerateFinish(reason=self.reason))
        finally:
            self.is_over = True


class Choice:
    """One entry per chunk; with `parses`, through a parser that yields to the event loop."""

    def __init__(self, number: int, *, parses: bool = False, parser_fails: bool = False) -> None:
        self._number = number
        self.parses = parses
        self._parser_fails = parser_fails
        self._texts: list[str] = []

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        self._texts.append(chunk.text)
        return [{"index": self._number, "text": chunk.text}]

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        await asyncio.sleep(0)
        if self._parser_fails:
            raise ParserFailed("the parser host ended")
        return self.take(chunk)

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        return [{"index": self._number, "end": True}]

    def as_json(self) -> dict[str, Any]:
        return {"index": self._number, "text": "".join(self._texts)}


class Call:
    """A client's call that records what was sent."""

    writable = True

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def send(self, body: Any) -> None:
        self.bodies.append(body)

    def on_writable(self, callback: Any) -> None:
        """Never called: it is always writable."""

    @property
    def events(self) -> list[Any]:
        data = b"".join(body.data for body in self.bodies).decode()
        blocks = [block.removeprefix("data: ") for block in data.split("\n\n") if block]
        return [block if block == "[DONE]" else json.loads(block) for block in blocks]

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [event["choices"][0] for event in self.events if event != "[DONE]" and event.get("choices")]


async def run(sources: Sequence[Source], call: Call, *, stream: bool = True, **choices: Any) -> None:
    class Generations:
        tenant_requests_max = 256

        async def generate(self, request: pb.GenerateRequest, caller: Caller, answer: Answer) -> None:
            await sources[int(request.request_id)].generate(answer)

    handler = EndpointHandler(cast("Generation", Generations()), cast("Any", None), lambda: ())
    requests = [pb.GenerateRequest(request_id=str(number)) for number in range(len(sources))]
    response = ApiResponse(
        {"id": "x"}, [Choice(number, **choices) for number in range(len(sources))], UsageSum(len(sources))
    )
    options = {"include_usage": True} if stream else None
    body = CommonFields.model_validate({"model": "m", "stream": stream, "stream_options": options})
    await handler.run(requests, response, Caller(), body, call)


@pytest.mark.parametrize("parses", [False, True])
@pytest.mark.parametrize("counts", [[3], [0], [0, 2], [5, 1, 3], [1] * 20])
async def test_every_entry_is_sent_once_and_in_order(counts: list[int], parses: bool) -> None:
    call = Call()
    await run([Source(count) for count in counts], call, parses=parses)
    for number, count in enumerate(counts):
        texts = [entry.get("text") for entry in call.entries if entry["index"] == number]
        assert texts == [*map(str, range(count)), None], "the finish is the last entry"
    assert call.events[-1] == "[DONE]"
    assert [body.content_type for body in call.bodies] == ["text/event-stream; charset=utf-8"] + [""] * (
        len(call.bodies) - 1
    )
    assert all(event == "[DONE]" or "usage" in event for event in call.events)


async def test_fast_choice_does_not_wait_for_a_slow_one() -> None:
    call = Call()
    await run([Source(2, 0.02), Source(20)], call)
    assert [entry["index"] for entry in call.entries[:20]].count(1) >= 18


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_one_failed_choice_ends_all(others: int) -> None:
    slow = [Source(1_000, 0.01) for _ in range(others)]
    call = Call()
    await run([*slow, Source(2, failure=LegFailed("broken"))], call)
    assert call.events[-1]["error"]["code"] == "leg_failed"
    assert all(source.is_over and source.given < 1_000 for source in slow)


@pytest.mark.parametrize("parses", [False, True])
async def test_failure_before_the_first_event_raises(parses: bool) -> None:
    call = Call()
    with pytest.raises(LegFailed):
        await run([Source(0, failure=LegFailed("broken")), Source(5, 0.01)], call, parses=parses)
    assert not call.bodies


async def test_parser_failure_ends_the_response() -> None:
    with pytest.raises(ParserFailed):
        await run([Source(3)], Call(), parses=True, parser_fails=True)


async def test_aborted_generation_raises() -> None:
    with pytest.raises(RequestAborted):
        await run([Source(0, reason=ABORTED)], Call())


async def test_cancelled_request_ends_all_choices() -> None:
    sources = [Source(1_000, 0.01) for _ in range(3)]
    task = asyncio.create_task(run(sources, Call()))
    await asyncio.gather(*(source.has_begun.wait() for source in sources))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(source.is_over for source in sources)


async def test_unstreamed_response_has_all_choices() -> None:
    call = Call()
    await run([Source(3), Source(2)], call, stream=False)
    (body,) = call.bodies
    assert body.content_type == "application/json"
    assert [choice["text"] for choice in json.loads(body.data)["choices"]] == ["012", "01"]
