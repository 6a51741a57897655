"""What real clients send beside OpenAI's schema: what asks for nothing is taken, what would change the answer is not.

Each row is a kind that public reports of other servers show, in the smallest form.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from tandem_frontend.openai.call_arguments import REPAIRED_CHARS_MAX, UNREADABLE, as_object
from tandem_frontend.openai.messages import for_template
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest
from tandem_frontend.openai.translation import chat_request, completion_request

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "x", **fields}


def asked(*messages: Any, **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": list(messages) or [USER], **fields}
    return parse(ChatRequest, json.dumps(body).encode())


def rendered(*messages: Any) -> list[dict[str, Any]]:
    return for_template(asked(*messages).messages, lambda text: text)


def refused(*messages: Any, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as problem:
        chat_request(asked(*messages, **fields))
    return problem.value.field


ANNOTATED: list[tuple[str, Any, Any]] = [
    ("what SDKs parsed", said(parsed={"a": 1}), said()),
    ("nothing parsed", said(parsed=None, refusal=None, audio=None, function_call=None), said()),
    ("an id and a time", said(id="msg_1", created=5, model="m", status="completed"), said()),
    ("thoughts under another name", said(reasoning="hm", reasoning_details=[{"text": "hm"}]), said()),
    ("citations", said(annotations=[{"type": "url_citation"}]), said()),
    ("a refusal beside text", said(refusal="no"), said()),
    ("a refusal alone", {"role": "assistant", "content": None, "refusal": "no"}, said(content="no")),
    ("a refusal as a part", said(content=[{"type": "refusal", "refusal": "no"}]), said(content="no")),
    (
        "a thought as a part",
        said(content=[{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}]),
        said(),
    ),
    ("parts of the Responses API", said(content=[{"type": "output_text", "text": "x", "logprobs": []}]), said()),
    ("no content at all", {"role": "assistant", "content": None}, said(content="")),
    ("no parts", said(content=[], tool_calls=None), said(content="")),
    ("a cached message", {**USER, "cache_control": {"type": "ephemeral"}}, USER),
    ("a cached part", {**USER, "content": [{"type": "text", "text": "hi", "cache_control": {}, "id": "p"}]}, USER),
    ("no attachments", {**USER, "images": [], "files": [], "attachments": []}, USER),
    (
        "no result",
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ),
    (
        "a result's flag",
        {"role": "tool", "tool_call_id": "c", "content": "4", "is_error": False},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ),
]


@pytest.mark.parametrize(("sent", "meant"), [row[1:] for row in ANNOTATED], ids=[row[0] for row in ANNOTATED])
def test_annotations_of_messages_change_nothing(sent: Any, meant: Any) -> None:
    assert rendered(sent) == [meant]


@pytest.mark.parametrize(
    "call",
    [
        {**CALL, "index": 0},
        {"id": "c", "function": {"name": "f", "arguments": "{}"}},
        {**CALL, "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}},
        {**CALL, "function": {"name": "f", "arguments": {}}},
        {**CALL, "function": {"name": "f", "arguments": None}},
        {**CALL, "function": {"name": "f"}},
        {**CALL, "extra_content": {"google": {}}},
    ],
)
def test_annotations_of_calls_change_nothing(call: Any) -> None:
    assert rendered(said(tool_calls=[call])) == rendered(said(tool_calls=[CALL]))


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        ("null", {}),
        ('{"city": "Os', {"city": "Os"}),
        ('{"city": "Os\\', {"city": "Os"}),
        ('{"city": "Os\\u00', {"city": "Os"}),
        ('{"path": "C:\\\\', {"path": "C:\\"}),
        ('{"a": 1, "b', {"a": 1, "b": None}),
        ('{"a": 1, "b"', {"a": 1, "b": None}),
        ('{"a": 1, "b":', {"a": 1, "b": None}),
        ('{"a": [1, {"b": tru', {"a": [1, {"b": None}]}),
        ('{"a": 1, ', {"a": 1}),
        ("{", {}),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        ('{"a": "he said "hi""}', {UNREADABLE: '{"a": "he said "hi""}'}),
        ("5", {UNREADABLE: 5}),
        ("[]", {UNREADABLE: []}),
        ("f(x)", {UNREADABLE: "f(x)"}),
        ('{"a": "\\ud83d"}', {"a": "\ufffd"}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ({"a": 1}, {"a": 1}),
        ("{" * 5_000, {UNREADABLE: "{" * 5_000}),
        ('{"a": "' + "x" * REPAIRED_CHARS_MAX, {UNREADABLE: '{"a": "' + "x" * REPAIRED_CHARS_MAX}),
    ],
)
def test_arguments_in_the_history_are_always_an_object(arguments: Any, read: dict[str, Any]) -> None:
    assert as_object(arguments) == read


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([said(function_call={"name": "f", "arguments": "{}"})], "messages[0].function_call"),
        ([said(audio={"id": "a"})], "messages[0].audio"),
        ([said(prefix=True)], "messages[0].prefix"),
        ([said(partial=True)], "messages[0].partial"),
        ([{**USER, "images": ["aGk="]}], "messages[0].images"),
        ([{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0].type"),
        ([said(content=[{"type": "image_url"}])], "messages[0].content[0].type"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([said(tool_calls=[{**CALL, "type": "custom"}])], "messages[0].tool_calls[0].type"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(messages: list[Any], param: str) -> None:
    assert refused(*messages) == param


NEUTRAL: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": -1},
    {"tools": [], "tool_choice": "none"},
    {"functions": [], "function_call": "auto"},
    {"function_call": "none"},
    {"verbosity": "medium"},
    {"stop": ""},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}, "stream": False},
    {"stop": [""]},
    {"logit_bias": {}},
    {"top_logprobs": 0},
    {"logprobs": False, "top_logprobs": 0},
    {"metadata": {"a": 1}},
    {"cache_control": {"type": "ephemeral"}},
    {"request_id": "mine"},
    {"cache_prompt": True},
    {"use_beam_search": False, "length_penalty": 1.0, "best_of": 1},
    {"repeat_penalty": 1.0, "typical_p": 1, "mirostat": 0, "dry_multiplier": 0.0, "xtc_probability": 0},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "add_special_tokens": False},
    {"include_stop_str_in_output": False, "no_stop_trim": False, "echo": False},
    {"return_token_ids": False, "return_tokens_as_token_ids": False, "return_hidden_states": False},
    {"prompt_logprobs": None, "guided_json": None, "structured_outputs": None, "lora_path": None},
    {"bad_words": [], "logits_processors": [], "documents": []},
    {"add_generation_prompt": True, "continue_final_message": False},
    {"separate_reasoning": True, "stream_reasoning": True},
]


@pytest.mark.parametrize("fields", NEUTRAL, ids=lambda fields: " ".join(fields))
def test_values_that_ask_for_nothing_change_nothing(fields: dict[str, Any]) -> None:
    plain = chat_request(asked())
    if fields.get("top_k") is not None:
        plain.sampling.top_k = -1
    assert chat_request(asked(**fields)) == plain


def test_tools_carry_annotations_too() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    cached = {**tool, "cache_control": {}, "function": {"name": "f", "cache_control": {}}}
    read = asked(tools=[cached]).tools or []
    assert [one.model_dump(exclude_none=True) for one in read] == [tool]


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed", "top_k", "min_tokens", "priority"])
def test_whole_floats_are_integers(name: str) -> None:
    assert chat_request(asked(**{name: 3.0})) == chat_request(asked(**{name: 3}))
    for wrong in (3.5, "3", True, 1e300):
        assert refused(**{name: wrong}) == name


def test_a_nucleus_of_nothing_is_the_likeliest_token() -> None:
    request = chat_request(asked(top_p=0))
    assert request.sampling.top_k == 1
    assert not request.sampling.HasField("top_p")


@pytest.mark.parametrize(
    "fields",
    [
        {"unheard_of": 5},
        {"use_beam_search": True},
        {"repeat_penalty": 1.1},
        {"mirostat": 2},
        {"skip_special_tokens": False},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "a"}},
        {"return_token_ids": True},
        {"continue_final_message": True},
        {"verbosity": "low"},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"best_of": 2},
        {"prompt_logprobs": 0},
        {"bad_words": ["a"]},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_values_that_ask_for_something_are_refused_by_name(fields: dict[str, Any]) -> None:
    assert refused(**fields) == next(iter(fields))


@pytest.mark.parametrize("fields", [{"suffix": ""}, {"suffix": None}, {"best_of": 1.0}, {"add_special_tokens": True}])
def test_neutral_values_of_completions(fields: dict[str, Any]) -> None:
    def of(**more: Any) -> pb.GenerateRequest:
        body = {"model": "m", "prompt": "hi", **more}
        return completion_request(parse(CompletionRequest, json.dumps(body).encode()))

    assert of(**fields) == of()
    with pytest.raises(InvalidRequest):
        of(suffix="x")
