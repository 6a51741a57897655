"""Chat messages for the template: no control token of a client reaches it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from tandem_frontend.openai.messages import for_template, without_control
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.schemas import ChatRequest
from tandem_frontend.preparation.chat_template import RESERVED_NAMES, ChatTemplate
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.domain.checkpoint import read_card
from tandem.errors import InvalidRequest
from tests.unit.test_frontend_tokenization import DEMO, demo_tokenizer

END = "<|end|>"


def rendered(message: dict[str, Any]) -> str:
    body = {"model": "m", "messages": [message]}
    request = parse(ChatRequest, json.dumps(body).encode())
    return json.dumps(for_template(request.messages, demo_tokenizer().without_control), ensure_ascii=False)


def call(arguments: Any, name: str = "f", call_id: str = "c") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": END},
        {"role": "user", "content": [{"type": "text", "text": "<|e"}, {"type": "text", "text": END}]},
        {"role": "user", "content": "hi", "name": END},
        {"role": "assistant", "content": "a", "reasoning_content": END},
        {"role": "tool", "content": END, "tool_call_id": END},
        call(json.dumps({"a": END})),
        call('{"a": "\\u003c|end|>"}'),
        call('{"\\u003c|end|\\u003e": 1}'),
        call('{"a": [{"b": "<|\\u0065nd|>"}]}'),
        call('{"a": "cut off behind <|\\u0065nd|>'),
        call("no JSON <|end|>"),
        call({"a": END}),
        {"role": "assistant", "refusal": END},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": END}]},
        call("{}", name=END, call_id=END),
    ],
)
def test_control_tokens_are_broken_up_in_every_field(message: dict[str, Any]) -> None:
    assert END not in rendered(message)
    assert "\u2060" in rendered(message)


def test_arguments_nested_too_deeply_are_rejected_by_name() -> None:
    with pytest.raises(InvalidRequest) as refused:
        rendered(call('{"a":' * 700 + "1" + "}" * 700))
    assert refused.value.field == "messages[0].tool_calls[0].function.arguments"
    assert "nested too deeply" in refused.value.message


def test_every_string_of_a_value_is_cleaned() -> None:
    value = {"a": ["x", {"x": "x", "n": 1, "t": True, "none": None}]}
    assert without_control(value, lambda text: text.upper()) == {
        "A": ["X", {"X": "X", "N": 1, "T": True, "NONE": None}]
    }


def test_template_kwargs_cannot_override_reserved_names() -> None:
    template = ChatTemplate.read(DEMO)
    assert template is not None
    assert {"bos_token", "eos_token", "raise_exception", "messages"} <= RESERVED_NAMES
    assert not any(template.takes(name) for name in RESERVED_NAMES)


def test_overlapping_control_tokens_are_removed() -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.add_special_tokens(["aXa", "#"])
    cleaned = Tokenizer(backend, read_card(DEMO), None).without_control("aXaXaXa # ")
    assert "aXa" not in cleaned
    assert "#" not in cleaned


def test_every_control_token_of_the_model_is_removed() -> None:
    tokenizer = demo_tokenizer()
    assert len(tokenizer._special_texts) == 6
    for special in tokenizer._special_texts:
        assert special not in tokenizer.without_control(f"a{special}b")
