"""The events of a stream as clients read them: whole lines for every reader, comments while nothing comes, usage."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import pytest
from tandem_frontend.call_context import Caller
from tandem_frontend.openai import response
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.pipeline import Answer, Generation
from tandem_frontend.response.sse import LINE_BREAKS, event_json, framed

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import LegFailed
from tests.unit.test_openai_choices import Call, Choice

HARD = "a" + "".join(LINE_BREAKS) + "\v\f\x1c\x1d\x1e\r\n✓\U0001f600"
STOP = generation_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("data", [response.event({"x": HARD}), framed(event_json(pb.GenerateChunk(text=HARD)))])
def test_no_reader_cuts_an_event_in_two(data: bytes) -> None:
    body = data.decode()
    assert body.splitlines() == [body.removesuffix("\n\n"), ""]
    value = json.loads(body.removeprefix("data: "))
    assert HARD in (value.get("x"), value.get("chunk", {}).get("text"))
    lines = list(httpx.Response(200, content=data).iter_lines())
    assert [line for line in lines if line] == [body.strip()]


def test_only_line_breaks_are_escaped() -> None:
    assert response.to_json({"x": "✓\U0001f600é"}) == '{"x":"✓\U0001f600é"}'.encode()


def test_the_content_type_names_the_encoding() -> None:
    kind, _, charset = response.EVENTS.partition("; charset=")
    assert (kind, codecs.lookup(charset).name) == ("text/event-stream", "utf-8")


class Comments(Call):
    """A call whose comments can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.commented = asyncio.Event()

    def send(self, body: Any) -> None:
        super().send(body)
        if body.data.startswith(b":"):
            self.commented.set()

    @property
    def sent(self) -> list[bytes]:
        return [body.data for body in self.bodies]


async def run(call: Call, generate: Callable[[Answer], Awaitable[None]], comment_s: float, **options: Any) -> None:
    class Generations:
        tenant_requests_max = 256

        async def generate(self, request: pb.GenerateRequest, caller: Caller, answer: Answer) -> None:
            await generate(answer)

    handler = EndpointHandler(cast("Generation", Generations()), cast("Any", None), lambda: (), comment_s=comment_s)
    body = CommonFields.model_validate({"model": "m", "stream": True, "stream_options": options or None})
    await handler.run([pb.GenerateRequest()], ApiResponse({"id": "x"}, [Choice(0)], UsageSum(1)), Caller(), body, call)


async def test_a_comment_comes_while_no_event_does() -> None:
    call = Comments()

    async def generate(answer: Answer) -> None:
        for number in range(2):
            call.commented.clear()
            await call.commented.wait()
            answer.chunk(pb.GenerateChunk(text=str(number)))
        await answer.finish(pb.GenerateFinish(reason=STOP))

    await run(call, generate, 0.01)
    assert call.bodies[0].content_type == response.EVENTS
    assert call.sent[0] == b": waiting\n\n"
    assert call.sent[-1] == response.DONE
    texts = [json.loads(data[6:])["choices"][0].get("text") for data in call.sent[:-1] if data.startswith(b"data: ")]
    assert texts == ["0", "1", None]
    before = len(call.bodies)
    await asyncio.sleep(0.03)
    assert len(call.bodies) == before, "no comment comes behind the end"


async def test_without_the_setting_nothing_comes_before_the_first_event() -> None:
    call = Comments()

    async def generate(answer: Answer) -> None:
        await asyncio.sleep(0.03)
        raise LegFailed("broken")

    with pytest.raises(LegFailed):
        await run(call, generate, 0)
    assert not call.bodies


async def test_a_failure_behind_a_comment_is_the_last_event() -> None:
    call = Comments()

    async def generate(answer: Answer) -> None:
        await call.commented.wait()
        raise LegFailed("broken")

    await run(call, generate, 0.01)
    assert json.loads(call.sent[-1][6:])["error"]["code"] == "leg_failed"


async def test_a_client_that_does_not_read_gets_no_comments() -> None:
    call = Comments()
    call.writable = False

    async def generate(answer: Answer) -> None:
        await asyncio.sleep(0.03)
        await answer.finish(pb.GenerateFinish(reason=STOP))

    await run(call, generate, 0.005)
    assert not call.commented.is_set()


async def test_every_event_has_the_usage_so_far_where_it_is_asked_for() -> None:
    call = Comments()

    async def generate(answer: Answer) -> None:
        answer.accepted(pb.GenerateAccepted(prompt_tokens=7))
        answer.chunk(pb.GenerateChunk(text="a", token_ids=[1, 2]))
        answer.chunk(pb.GenerateChunk(text="b", token_ids=[3]))
        usage = generation_pb2.Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=5)
        await answer.finish(pb.GenerateFinish(reason=STOP, usage=usage))

    await run(call, generate, 0, include_usage=True, continuous_usage_stats=True)
    *events, done = call.sent
    assert done == response.DONE
    usages = [json.loads(event[6:])["usage"] for event in events]
    assert [(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) for usage in usages] == [
        (7, 2, 9),
        (7, 3, 10),
        (7, 3, 10),
        (7, 3, 10),
    ]
    assert usages[-1]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert json.loads(events[-1][6:])["choices"] == []
