"""One choice of a chat completion: its streamed deltas, and the message they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tandem_frontend.openai.chat_choice import ChatChoice
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.output_parsers import Content, Delta, Reasoning, ToolCallArguments, ToolCallStart
from tests.unit.test_frontend_tokenization import DEMO

STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH
CALL = (ToolCallStart(0, "call_0", "look"), ToolCallArguments(0, '{"a"'), ToolCallArguments(0, ": 1}"))
SECOND = (ToolCallStart(1, "call_1", "wait"), ToolCallArguments(1, "{}"))


class Scripted:
    """A parser that returns scripted deltas."""

    def __init__(self, feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = ()) -> None:
        self._feeds = list(feeds)
        self._rest = rest

    async def feed(self, text: str) -> list[Delta]:
        return list(self._feeds.pop(0))

    async def close(self, *, complete: bool) -> list[Delta]:
        self.was_complete = complete
        return list(self._rest)


async def outputs(
    feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = (), reason: Any = STOP, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The streamed entries, and the entry of the unstreamed response."""
    parsed: Any = Scripted(feeds, rest)
    texts = TokenTexts(Tokenizer.open(DEMO))
    choice = ChatChoice(0, pb.GenerateRequest(), texts, parsed, **options)
    entries: list[dict[str, Any]] = []
    for _ in feeds:
        entries += await choice.parse(pb.GenerateChunk(text="x"))
    entries += await choice.end(pb.GenerateFinish(reason=reason))
    return entries, choice.as_json()


def deltas(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry["delta"] for entry in entries]


ROLE = {"role": "assistant", "content": "", "refusal": None}


async def test_streamed_tool_call_is_a_start_and_argument_fragments() -> None:
    entries, whole = await outputs([[Content("Let me look.")], CALL[:2], [], CALL[2:]])
    assert deltas(entries) == [
        ROLE,
        {"content": "Let me look."},
        {
            "tool_calls": [
                {"index": 0, "id": "call_0", "type": "function", "function": {"name": "look", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {},
    ]
    assert [entry["finish_reason"] for entry in entries] == [None] * 5 + ["tool_calls"]
    assert whole["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "refusal": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}],
    }
    assert whole["finish_reason"] == "tool_calls"


async def test_message_with_only_a_tool_call_has_null_content() -> None:
    _, whole = await outputs([CALL])
    assert whole["message"]["content"] is None


async def test_truncated_tool_call_finishes_with_length() -> None:
    entries, whole = await outputs([CALL[:2]], reason=LENGTH)
    assert entries[-1]["finish_reason"] == whole["finish_reason"] == "length"


@pytest.mark.parametrize(("reason", "complete"), [(STOP, True), (LENGTH, False)])
async def test_parser_completes_only_output_that_was_not_truncated(reason: Any, complete: bool) -> None:
    parsed: Any = Scripted([[]])
    choice = ChatChoice(0, pb.GenerateRequest(), TokenTexts(Tokenizer.open(DEMO)), parsed)
    await choice.end(pb.GenerateFinish(reason=reason))
    assert parsed.was_complete is complete


async def test_second_tool_call_is_dropped_where_one_is_allowed() -> None:
    _, both = await outputs([CALL, SECOND])
    assert [call["id"] for call in both["message"]["tool_calls"]] == ["call_0", "call_1"]
    entries, one = await outputs([CALL, SECOND], one_call_only=True)
    assert [call["id"] for call in one["message"]["tool_calls"]] == ["call_0"]
    assert not [delta for delta in deltas(entries) for call in delta.get("tool_calls", []) if call["index"] == 1]


async def test_reasoning_is_separate_from_content() -> None:
    entries, whole = await outputs([[Reasoning("He hid ")], [Reasoning("it."), Content("In the barn")]], [Content(".")])
    assert deltas(entries) == [
        ROLE,
        {"reasoning_content": "He hid "},
        {"reasoning_content": "it."},
        {"content": "In the barn"},
        {"content": "."},
        {},
    ]
    assert whole["message"]["reasoning_content"] == "He hid it."
    assert whole["message"]["content"] == "In the barn."
    assert whole["finish_reason"] == "stop"


async def test_empty_output_still_has_a_role_and_a_finish() -> None:
    entries, whole = await outputs([[]])
    assert deltas(entries) == [ROLE, {}]
    assert whole["message"]["content"] == ""


@pytest.mark.parametrize("parses", [False, True])
async def test_log_probabilities_wait_for_the_next_text(parses: bool) -> None:
    parsed: Any = Scripted([[], [Content("ab")], []]) if parses else None
    texts = TokenTexts(Tokenizer.open(DEMO))
    request = pb.GenerateRequest(logprobs={})  # type: ignore[arg-type]
    choice = ChatChoice(0, request, texts, parsed)
    entries = []
    for token_id, text in ((70, ""), (71, "ab"), (72, "")):
        logprob = generation_pb2.TokenLogprob(token_id=token_id, logprob=-1)
        chunk = pb.GenerateChunk(text=text, logprobs=[logprob])
        entries += await choice.parse(chunk) if parses else choice.take(chunk)
    entries += await choice.end(pb.GenerateFinish(reason=LENGTH))
    given = [entry["logprobs"]["content"] for entry in entries if entry["logprobs"]]
    assert [len(content) for content in given] == [2, 1]
    assert choice.as_json()["logprobs"]["content"] == [logprob for content in given for logprob in content]
