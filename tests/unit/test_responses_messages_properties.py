"""Properties of both translations: any JSON is taken or refused by name, and no text of a conversation is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.anthropic.schemas import MessagesRequest
from tandem_frontend.anthropic.translation import Translated as TranslatedMessages
from tandem_frontend.openai.messages import for_template
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.responses_api.translation import Translated as TranslatedResponse

from tandem.errors import InvalidRequest
from tests.unit.support.examples import examples

USER = {"role": "user", "content": "hi"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.integers(0, 10**9).map("w{}".format)
"""Texts that differ, wherever they end up."""


def responses_body(body: dict[str, Any]) -> TranslatedResponse:
    return TranslatedResponse(parse(ResponsesRequest, json.dumps({"model": "m", "input": "a", **body}).encode()))


def messages_body(body: dict[str, Any]) -> TranslatedMessages:
    data = json.dumps({"model": "m", "max_tokens": 1, "messages": [USER], **body}).encode()
    return TranslatedMessages(parse(MessagesRequest, data), lambda name: False, reasons=False)


@pytest.mark.parametrize(
    ("translate", "schema"), [(responses_body, ResponsesRequest), (messages_body, MessagesRequest)], ids=lambda x: None
)
def test_any_json_is_taken_or_refused_with_a_parameter(translate: Any, schema: Any) -> None:
    names = st.sampled_from(sorted(schema.model_fields)) | st.text("abc_", min_size=1, max_size=5)

    @settings(max_examples=examples(300), deadline=None)
    @given(body=st.dictionaries(names, JSON, max_size=5))
    def check(body: dict[str, Any]) -> None:
        field = refused_field(translate, body)
        assert field is None or re.split(r"[.\[]", field)[0] in {*body, "input", "messages", "max_tokens"}

    check()


def refused_field(translate: Callable[[dict[str, Any]], Any], body: dict[str, Any]) -> str | None:
    """The field of the refusal; None: the request was translated."""
    try:
        translate(body)
    except InvalidRequest as refused:
        return refused.field
    return None


KINDS = ("user", "assistant", "system", "thought", "call", "output")


@st.composite
def items(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str]]:
    """Items of `input`, and their texts in order."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1)):
        word = draw(WORDS)
        texts.append(word)
        match kind:
            case "thought":
                content = [{"type": "reasoning_text", "text": word}]
                found.append({"type": "reasoning", "id": "r", "summary": [], "content": content})
            case "call":
                found.append({"type": "function_call", "call_id": "c", "name": word, "arguments": "{}"})
            case "output":
                found.append({"type": "function_call_output", "call_id": "c", "output": word})
            case role:
                found.append({"role": role, "content": [{"type": "input_text", "text": word}]})
    return found, texts


@settings(max_examples=examples(300), deadline=None)
@given(given=items())
def test_every_text_of_a_response_request_is_in_a_message_in_order(given: tuple[list[Any], list[str]]) -> None:
    sent, texts = given
    assert words_of(responses_body({"input": sent})) == texts


@st.composite
def turns(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages, and their texts in the order in which a chat message holds them."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=6)):
        word, more = draw(WORDS), draw(WORDS)
        if role == "assistant":
            kinds: list[dict[str, Any]] = [
                {"type": "thinking", "thinking": word, "signature": ""},
                {"type": "tool_use", "id": "c", "name": more, "input": {}},
            ]
        else:
            kinds = [
                {"type": "tool_result", "tool_use_id": "c", "content": word},
                {"type": "text", "text": more},
            ]
        # A user's turn between two of the model's: neighbours would be one turn, with the texts of both in its order.
        found += [{"role": role, "content": kinds}, USER]
        texts += [word, more, "hi"]
    return [USER, *found], ["hi", *texts]


@settings(max_examples=examples(300), deadline=None)
@given(given=turns())
def test_every_text_of_a_message_request_is_in_a_message_in_order(given: tuple[list[Any], list[str]]) -> None:
    sent, texts = given
    assert words_of(messages_body({"messages": sent})) == texts


def words_of(translated: Any) -> list[str]:
    """The words of the rendered messages, in the order of reasoning, text and calls within each."""
    words: list[str] = []
    for message in for_template(translated.chat.messages, lambda text: text):
        words += message.get("reasoning_content", "").split()
        words += message["content"].split()
        words += [call["function"]["name"] for call in message.get("tool_calls", ())]
    return words
