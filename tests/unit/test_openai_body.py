"""Parsing of OpenAI request bodies: an error names its parameter, and no input breaks the parser."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.openai.common_params import Schema
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest

from tandem.errors import InvalidRequest
from tests.unit.support.examples import examples

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "openai.md"
USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"", "body", "is not JSON"),
        (b"{", "body", "is not JSON"),
        (b'{"model": "\xff"}', "body", "is not JSON"),
        (b'{"model": "\\ud800"}', "body", "is not JSON"),
        (b"[]", "body", "must be a JSON object"),
        (b"null", "body", "must be a JSON object"),
        (b"1e999", "body", "must be a JSON object"),
        (b"[" * 100_000, "body", "is not JSON"),
        (b"{}", "model", "must be given"),
        (b'{"model": "m"}', "messages", "must be given"),
        (chat(messages=[]), "messages", "must not be empty"),
        (chat(messages="hi"), "messages", "must be a valid array"),
        (chat(messages=[{"role": "user"}]), "messages[0].content", "must be given"),
        (chat(messages=[USER, {"content": "hi"}]), "messages[1].role", "must be given"),
        (chat(messages=[{"role": "robot", "content": "hi"}]), "messages[0].role", "must be one of"),
        (chat(messages=[{**USER, "images": ["aGk="]}]), "messages[0].images", "is not supported"),
        (chat(messages=[{"role": "user", "content": []}]), "messages[0].content", "must not be empty"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]),
            "messages[0].content[1].type",
            "must be 'text'",
        ),
        (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "given"),
        (chat(messages=[{"role": "tool", "content": "4"}]), "messages[0].tool_call_id", "must be given"),
        (chat(messages=[{"role": "assistant", "tool_calls": [{**CALL, "id": 1}]}]), "messages[0].tool_calls[0].id", ""),
        (chat(temperature="1"), "temperature", "must be a valid number"),
        (chat(temperature=True), "temperature", "must be a valid number"),
        (chat(stream=1), "stream", "must be a valid boolean"),
        (chat(n=0), "n", "at least 1"),
        (chat(n=129), "n", "at most 128"),
        (chat(max_tokens=1.5), "max_tokens", "integer"),
        (chat(max_tokens=2**31), "max_tokens", "at most"),
        (chat(seed=2**63), "seed", "at most"),
        (chat(stop=[1]), "stop[0]", "must be a valid string"),
        (chat(stop={}), "stop", "must be"),
        (chat(logit_bias={"5": "x"}), "logit_bias.5", "number"),
        (chat(logit_bias=[]), "logit_bias", "object"),
        (chat(stream_options={"x": 1}), "stream_options.x", "is not a parameter"),
        (chat(store=True), "store", "must be False"),
        (chat(service_tier="flex"), "service_tier", "must be 'auto' or 'default'"),
        (chat(modalities=["audio"]), "modalities[0]", "must be 'text'"),
        (chat(audio={}), "audio", "is not supported"),
        (chat(functions=[{"name": "f"}]), "functions", "is not supported"),
        (chat(response_format={"type": "xml"}), "response_format.type", "must be one of"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "must be given"),
        (chat(tools=[{"type": "web"}]), "tools[0].type", "must be 'function'"),
        (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "pattern"),
        (chat(tool_choice="always"), "tool_choice", "must be"),
        (chat(unheard_of=None), "unheard_of", "is not a parameter"),
        (chat(**{"a\nb" * 100: 1}), ("a\nb" * 100)[:200], "is not a parameter"),
    ],
)
def test_error_names_its_parameter(body: bytes, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(ChatRequest, body)
    assert refused.value.field == param
    assert words in refused.value.message
    assert len(refused.value.message) < 1_000


def test_null_equals_absence() -> None:
    names = {field.alias or name for name, field in ChatRequest.model_fields.items()} - {"model", "messages"}
    assert parse(ChatRequest, chat(**dict.fromkeys(names))) == parse(ChatRequest, chat())


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]], [], ""])
def test_prompt_accepts_every_shape(prompt: Any) -> None:
    assert parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()).prompt == prompt


@pytest.mark.parametrize("schema", [ChatRequest, CompletionRequest])
def test_docs_name_every_parameter(schema: type[Schema]) -> None:
    named = set(re.findall(r"`([a-z_]+)", DOCS.read_text()))
    assert {field.alias or name for name, field in schema.model_fields.items()} <= named


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "schema"}))


@settings(max_examples=examples(500), deadline=None)
@given(body=st.dictionaries(NAMES, JSON, max_size=8), schema=st.sampled_from([ChatRequest, CompletionRequest]))
def test_any_json_is_accepted_or_rejected_with_a_parameter(body: dict[str, Any], schema: type[Schema]) -> None:
    whole = {"model": "m", "messages": [USER], "prompt": "a", **body}
    whole.pop("prompt" if schema is ChatRequest else "messages", None)
    param = refused_param(schema, json.dumps(whole).encode())
    assert param in {None, "body"} or re.split(r"[.\[]", str(param))[0] in whole


def refused_param(schema: type[Schema], data: bytes) -> str | None:
    """The rejected parameter; None: the request is valid."""
    try:
        parse(schema, data)
    except InvalidRequest as refused:
        return refused.field
    return None


@settings(max_examples=examples(200), deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_rejected(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, data)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":"m","messages":[' + b",".join([b"{}"] * 350_000) + b"]}", "messages[0].role"),
        (b'{"model":"m","messages":[],"stop_token_ids":[' + b"{}," * 350_000 + b"0]}", "stop_token_ids[0]"),
        (b"{" + b",".join(b'"k%d":0' % number for number in range(90_000)) + b"}", "body"),
    ],
    ids=["messages", "token ids", "names"],
)
def test_many_errors_are_not_all_collected(body: bytes, param: str) -> None:
    begin_s = time.process_time()
    with pytest.raises(InvalidRequest) as refused:
        parse(ChatRequest, body)
    assert refused.value.field == param
    # Collecting all of them takes about six seconds.
    assert time.process_time() - begin_s < 1.5
