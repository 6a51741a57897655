"""Events and messages of Anthropic's API: its order, its stop reasons and usage, and the same message both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from tandem_frontend.anthropic.output import MessageOutput
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import LegFailed, ParserFailed
from tandem.output_parsers import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart
from tests.unit.support.block_outputs import CALL, LENGTH, SECOND, STOP, count_words, outputs
from tests.unit.test_frontend_tokenization import DEMO


def output(parsed: Any, *, max_tokens: int = 9, hides_thinking: bool = False, streams: bool = True) -> MessageOutput:
    request = pb.GenerateRequest()
    request.token_ids.ids.extend(range(20))
    texts = TokenTexts(Tokenizer.open(DEMO))
    return MessageOutput(
        "m",
        max_tokens,
        count_words,
        request,
        texts,
        parsed,
        one_call_only=False,
        streams=streams,
        hides_thinking=hides_thinking,
    )


async def run(
    feeds: Sequence[Sequence[Delta]],
    rest: Sequence[Delta] = (),
    *,
    reason: Any = STOP,
    stop: str | None = None,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return await outputs(lambda parsed: output(parsed, **options), feeds, rest, reason=reason, stop=stop)


def rebuilt(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that the events add up to, as Anthropic's SDKs do it."""
    content: list[dict[str, Any]] = []
    pieces: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(content)
            content.append(dict(event["content_block"]))
            pieces[event["index"]] = ""
        elif event["type"] == "content_block_delta":
            pieces[event["index"]] += next(value for name, value in event["delta"].items() if name != "type")
    for index, block in enumerate(content):
        name = {"text": "text", "thinking": "thinking", "tool_use": "input"}[block["type"]]
        block[name] = json.loads(pieces[index]) if name == "input" else pieces[index]
    return content


async def test_a_text_is_one_block_in_anthropics_order() -> None:
    events, whole = await run([[Content("Mia ")], [Content("hid it")], []])
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"] | {"id": whole["id"]} == {
        "id": whole["id"],
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": events[0]["message"]["usage"],
    }
    assert events[1]["content_block"] == {"type": "text", "text": ""}
    assert events[2]["delta"] == {"type": "text_delta", "text": "Mia "}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert whole["content"] == [{"type": "text", "text": "Mia hid it"}] == rebuilt(events)


async def test_thinking_text_and_two_calls_are_four_blocks() -> None:
    feeds: list[Sequence[Delta]] = [
        [Reasoning("I must ")],
        [Reasoning("look")],
        [Content("Let me.")],
        CALL[:2],
        CALL[2:],
        SECOND,
    ]
    events, whole = await run(feeds)
    assert whole["content"] == [
        {"type": "thinking", "thinking": "I must look", "signature": ""},
        {"type": "text", "text": "Let me."},
        {"type": "tool_use", "id": "call_0", "name": "look", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "wait", "input": {}},
    ]
    assert rebuilt(events) == whole["content"]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("tool_use", None)
    order = [(event["type"], event["index"]) for event in events if "index" in event]
    starts = [index for kind, index in order if kind == "content_block_start"]
    assert starts == [0, 1, 2, 3]
    for index in starts[1:]:
        assert order.index(("content_block_stop", index - 1)) == order.index(("content_block_start", index)) - 1


async def test_usage_counts_cached_tokens_apart() -> None:
    events, whole = await run([[Reasoning("one two")], [Content("three")]])
    assert events[0]["message"]["usage"]["input_tokens"] == 20, "which are cached is not known yet"
    assert whole["usage"] == events[-2]["usage"]
    assert whole["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 16,
        "output_tokens": 9,
        "service_tier": "standard",
        "output_tokens_details": {"thinking_tokens": 2},
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "end_turn"),
        ({"stop": "###"}, "stop_sequence"),
        ({"reason": LENGTH}, "max_tokens"),
        ({"reason": LENGTH, "max_tokens": 10}, "model_context_window_exceeded"),
    ],
)
async def test_stop_reasons(options: dict[str, Any], reason: str) -> None:
    _, whole = await run([[Content("x")]], **options)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, options.get("stop"))


async def test_a_call_that_the_limit_cut_off_has_the_arguments_so_far() -> None:
    feeds: list[Sequence[Delta]] = [
        [ToolCallStart(0, "c", "look"), ToolCallArguments(0, '{"where": "barn", "when": "to')]
    ]
    _, whole = await run(feeds, reason=LENGTH)
    assert whole["content"][0]["input"] == {"where": "barn"}
    assert whole["stop_reason"] == "max_tokens"


async def test_arguments_that_are_no_object_fail_a_message() -> None:
    with pytest.raises(ParserFailed):
        await run([[ToolCallStart(0, "c", "look"), ToolCallArguments(0, "[1]")]])


async def test_thinking_without_its_text() -> None:
    events, whole = await run([[Reasoning("secret")], [Content("x")]], hides_thinking=True)
    assert whole["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert "secret" not in json.dumps(events)
    assert whole["usage"]["output_tokens_details"] == {"thinking_tokens": 1}


async def test_white_space_beside_a_call_is_no_block() -> None:
    _, whole = await run([[Reasoning("\n")], [Content("\n\n")], [*CALL], [Content("\n")]])
    assert [block["type"] for block in whole["content"]] == ["tool_use"]


async def test_an_empty_message_has_no_block() -> None:
    events, whole = await run([])
    assert [event["type"] for event in events] == ["message_start", "message_delta", "message_stop"]
    assert whole["content"] == []


@pytest.mark.parametrize(
    ("problem", "kind"),
    [(LegFailed("broken", role="decode"), "overloaded_error"), (RuntimeError("x"), "api_error")],
)
async def test_a_failure_is_the_last_event(problem: Exception, kind: str) -> None:
    choice = output(None)
    events = choice.take(pb.GenerateChunk(text="Mia")) + choice.failed(problem)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"]["type"] == kind
    assert set(events[-1]["error"]) == {"type", "message"}
