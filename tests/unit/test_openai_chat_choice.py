"""One answer of a chat: deltas as a stream tells them, and the message they add up to."""

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
    """A parser that says what it was told to."""

    def __init__(self, feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = ()) -> None:
        self._feeds = list(feeds)
        self._rest = rest

    async def feed(self, text: str) -> list[Delta]:
        return list(self._feeds.pop(0))

    async def close(self, *, complete: bool) -> list[Delta]:
        self.was_complete = complete
        return list(self._rest)


async def told(
    feeds: Sequence[Sequence[Delta]], rest: Sequence[Delta] = (), reason: Any = STOP, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The entries of a stream, and the whole answer."""
    parsed: Any = Scripted(feeds, rest)
    texts = TokenTexts(Tokenizer.open(DEMO))
    choice = ChatChoice(0, pb.GenerateRequest(), texts, parsed, **options)
    entries: list[dict[str, Any]] = []
    for _ in feeds:
        entries += await choice.parse(pb.GenerateChunk(text="x"))
    entries += await choice.end(pb.GenerateFinish(reason=reason))
    return entries, choice.told()


def deltas(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry["delta"] for entry in entries]


ROLE = {"role": "assistant", "content": "", "refusal": None}


async def test_a_call_as_a_stream_tells_it() -> None:
    entries, whole = await told([[Content("Let me look.")], CALL[:2], [], CALL[2:]])
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


async def test_a_call_alone_has_no_content() -> None:
    _, whole = await told([CALL])
    assert whole["message"]["content"] is None


async def test_a_call_that_was_cut_off_ended_by_its_length() -> None:
    entries, whole = await told([CALL[:2]], reason=LENGTH)
    assert entries[-1]["finish_reason"] == whole["finish_reason"] == "length"


@pytest.mark.parametrize(("reason", "complete"), [(STOP, True), (LENGTH, False)])
async def test_the_parser_is_told_whether_the_model_came_to_its_end(reason: Any, complete: bool) -> None:
    parsed: Any = Scripted([[]])
    choice = ChatChoice(0, pb.GenerateRequest(), TokenTexts(Tokenizer.open(DEMO)), parsed)
    await choice.end(pb.GenerateFinish(reason=reason))
    assert parsed.was_complete is complete


async def test_two_calls_and_one_at_most() -> None:
    _, both = await told([CALL, SECOND])
    assert [call["id"] for call in both["message"]["tool_calls"]] == ["call_0", "call_1"]
    entries, one = await told([CALL, SECOND], one_call_only=True)
    assert [call["id"] for call in one["message"]["tool_calls"]] == ["call_0"]
    assert not [delta for delta in deltas(entries) for call in delta.get("tool_calls", []) if call["index"] == 1]


async def test_reasoning_stands_beside_content() -> None:
    entries, whole = await told([[Reasoning("He hid ")], [Reasoning("it."), Content("In the barn")]], [Content(".")])
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


async def test_an_answer_of_nothing_still_begins_and_ends() -> None:
    entries, whole = await told([[]])
    assert deltas(entries) == [ROLE, {}]
    assert whole["message"]["content"] == ""


@pytest.mark.parametrize("parses", [False, True])
async def test_no_log_probability_is_lost_while_nothing_shows(parses: bool) -> None:
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
    assert choice.told()["logprobs"]["content"] == [logprob for content in given for logprob in content]
