"""Events and objects of the Responses API: OpenAI's order, numbers without a gap, and the same response both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.responses_api.output import ResponseOutput, response_head
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import LegFailed, ParserFailed
from tandem.output_parsers import Content, Delta, Reasoning, ToolCallArguments
from tests.unit.support.block_outputs import CALL, LENGTH, SECOND, STOP, count_words, outputs
from tests.unit.test_frontend_tokenization import DEMO


def output(
    parsed: Any,
    *,
    one_call_only: bool = False,
    streams: bool = True,
    request: Any = None,
    names: dict[str, tuple[str, str]] | None = None,
    **body: Any,
) -> ResponseOutput:
    asked = ResponsesRequest.model_validate({"model": "m", "input": "hi", **body})
    return ResponseOutput(
        response_head(asked, "m", {"temperature": 0.6}),
        count_words,
        names or {},
        request or pb.GenerateRequest(),
        TokenTexts(Tokenizer.open(DEMO)),
        parsed,
        one_call_only=one_call_only,
        streams=streams,
    )


async def run(
    feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = (), *, reason: Any = STOP, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return await outputs(lambda parsed: output(parsed, **options), feeds, rest, reason=reason)


def kinds(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added", "output_text.delta"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]
ARGUMENTS = "function_call_arguments"


async def test_a_text_is_one_message_in_openais_order() -> None:
    events, whole = await run([[Content("Mia ")], [Content("hid")], []], [Content(" it")])
    assert kinds(events) == ["created", "in_progress", *TEXT, *["output_text.delta"] * 2, *TEXT_END, "completed"]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert [event["delta"] for event in events if event["type"].endswith("text.delta")] == ["Mia ", "hid", " it"]
    (item,) = whole["output"]
    assert item["content"] == [{"type": "output_text", "text": "Mia hid it", "annotations": [], "logprobs": []}]
    assert (item["role"], item["status"], whole["status"]) == ("assistant", "completed", "completed")
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[-1]["response"] == whole


async def test_reasoning_text_and_two_calls_are_four_items() -> None:
    feeds: list[Sequence[Delta]] = [
        [Reasoning("I must ")],
        [Reasoning("look")],
        [Content("Let me.")],
        CALL[:2],
        CALL[2:],
        SECOND,
    ]
    events, whole = await run(feeds)
    assert kinds(events) == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *TEXT,
        *TEXT_END,
        *("output_item.added", f"{ARGUMENTS}.delta", f"{ARGUMENTS}.delta", f"{ARGUMENTS}.done", "output_item.done"),
        *("output_item.added", f"{ARGUMENTS}.delta", f"{ARGUMENTS}.done", "output_item.done"),
        "completed",
    ]
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    thought, _, look, wait = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "I must look"}]
    assert (look["call_id"], look["name"], look["arguments"]) == ("call_0", "look", '{"a": 1}')
    assert (wait["call_id"], wait["arguments"]) == ("call_1", "{}")
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == sorted(indices), "an item ends before the next one begins"


async def test_a_call_of_a_namespace_has_the_clients_two_names() -> None:
    events, whole = await run([[*CALL]], names={"look": ("agents", "see")})
    (item,) = whole["output"]
    assert (item["name"], item["namespace"]) == ("see", "agents")
    added, done = (event for event in events if event["type"].startswith("response.output_item."))
    assert (added["item"]["name"], added["item"]["namespace"], done["item"]["name"]) == ("see", "agents", "see")
    assert [event["name"] for event in events if event["type"].endswith("arguments.done")] == ["see"]


async def test_every_event_is_one_that_the_sdk_knows() -> None:
    sdk = pytest.importorskip("openai.types.responses")
    known: TypeAdapter[Any] = TypeAdapter(sdk.ResponseStreamEvent)
    events, whole = await run([[Reasoning("so")], [Content("Mia")], [*CALL]], text={"verbosity": "medium"})
    failed = output(None)
    begun = failed.take(pb.GenerateChunk(text="Mia"))
    for event in [*events, *begun, failed.failed(LegFailed("broken", role="decode"))[-1]]:
        assert known.validate_python(event).type == event["type"]
    assert sdk.Response.model_validate(whole).output_text == "Mia"


async def test_usage_counts_cached_and_reasoning_tokens() -> None:
    _, whole = await run([[Reasoning("one two three")], [Content("four")]])
    assert whole["usage"] == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 29,
    }


async def test_the_token_limit_makes_a_response_incomplete() -> None:
    events, whole = await run([[Content("Mia")]], reason=LENGTH)
    assert kinds(events)[-1] == "incomplete"
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"
    assert "completed_at" not in whole


async def test_white_space_beside_a_call_or_reasoning_is_no_message() -> None:
    feeds: list[Sequence[Delta]] = [[Reasoning("\n")], [Content("\n")], [Content("\n")], CALL, [Content("\n")], SECOND]
    _, whole = await run(feeds)
    assert [item["type"] for item in whole["output"]] == ["function_call", "function_call"]


async def test_white_space_before_reasoning_and_behind_it_is_in_no_item() -> None:
    _, whole = await run([[Reasoning("\nso ")], [Reasoning("it is")], [Content("\n\n")], [Content(" Mia ")], []])
    assert [item["content"][0]["text"] for item in whole["output"]] == ["so it is", "Mia "]


@pytest.mark.parametrize(("texts", "text"), [(["\n", "\n"], "\n\n"), ([" ", "x"], " x"), ([], "")])
async def test_a_response_without_calls_has_a_message(texts: list[str], text: str) -> None:
    events, whole = await run([[Content(each)] for each in texts])
    assert [item["content"][0]["text"] for item in whole["output"]] == [text]
    assert kinds(events)[:2] == ["created", "in_progress"]
    assert kinds(events)[-1] == "completed"


async def test_one_call_only_drops_the_second() -> None:
    _, whole = await run([CALL, SECOND], one_call_only=True)
    assert [item["name"] for item in whole["output"]] == ["look"]


async def test_arguments_behind_the_end_of_their_call_fail_a_stream_only() -> None:
    feeds: list[Sequence[Delta]] = [CALL[:2], SECOND, [ToolCallArguments(0, ": 1}")]]
    with pytest.raises(ParserFailed):
        await run(feeds)
    _, whole = await run(feeds, streams=False)
    assert [item["arguments"] for item in whole["output"]] == ['{"a": 1}', "{}"]


async def test_log_probabilities_are_of_the_text() -> None:
    request = pb.GenerateRequest()
    request.logprobs.top_logprobs = 1
    choice = output(None, request=request)
    token = generation_pb2.TokenLogprob(token_id=70, logprob=-0.5)
    token.top.add(token_id=70, logprob=-0.5)
    events = choice.take(pb.GenerateChunk(text="a", logprobs=[token]))
    # The last token is half a character.
    events += choice.take(pb.GenerateChunk(logprobs=[token]))
    events += await choice.end(pb.GenerateFinish(reason=STOP))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [delta["delta"] for delta in deltas] == ["a", ""]
    assert [[entry["logprob"] for entry in delta["logprobs"]] for delta in deltas] == [[-0.5], [-0.5]]
    assert choice.as_json()["output"][0]["content"][0]["logprobs"] == [*deltas[0]["logprobs"], *deltas[1]["logprobs"]]


async def test_a_failure_is_an_error_and_a_failed_response() -> None:
    choice = output(None)
    events = choice.take(pb.GenerateChunk(text="Mia"))
    events += choice.failed(LegFailed("broken", role="decode"))
    assert kinds(events)[-2:] == ["error", "failed"]
    error, failed = events[-2:]
    assert error["error"]["code"] == error["code"] == "leg_failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    assert [event["sequence_number"] for event in events] == [*range(len(events))]


async def test_the_response_repeats_the_request_and_says_what_holds() -> None:
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}
    _, whole = await run(
        [[Content("x")]],
        tools=[tool],
        tool_choice={"type": "function", "name": "look"},
        text={"format": schema},
        metadata={"a": "b"},
        instructions="Be brief.",
        top_p=0.5,
    )
    assert whole["tools"] == [tool]
    assert whole["tool_choice"] == {"type": "function", "name": "look"}
    assert whole["text"] == {"verbosity": "medium", "format": schema}
    assert (whole["metadata"], whole["instructions"]) == ({"a": "b"}, "Be brief.")
    assert (whole["temperature"], whole["top_p"]) == (0.6, 0.5), "the model's own, and the request's"
    assert whole["store"] is False
