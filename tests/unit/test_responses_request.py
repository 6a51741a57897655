"""Requests of the Responses API: what each becomes in a chat request, and the name in every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.messages import for_template
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.responses_api.translation import Translated

from tandem.errors import InvalidRequest

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "responses.md"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}}
WAIT = {"type": "function", "name": "wait"}
SPACE = {"type": "namespace", "name": "agents", "description": "Other agents.", "tools": [TOOL, WAIT]}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hi", **fields}).encode()


def translated(**fields: Any) -> Translated:
    return Translated(parse(ResponsesRequest, raw(**fields)))


def messages(**fields: Any) -> list[dict[str, Any]]:
    return for_template(translated(**fields).chat.messages, lambda text: text)


def test_a_text_and_instructions() -> None:
    assert messages(instructions="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_instructions_and_the_messages_behind_them_are_one() -> None:
    """Codex sends instructions, a developer's message and the user's."""
    sent = [{"role": "developer", "content": "Be kind."}, {"type": "message", "role": "user", "content": "hi"}]
    assert messages(instructions="Be brief.", input=sent) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "hi"},
    ]


def test_a_response_that_is_sent_back() -> None:
    """Items as this server sent them: ids, states and annotations mean nothing, and the turn is one message."""
    said = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    }
    sent = [
        {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("Where?", "When?")]},
        THOUGHT,
        said,
        {**CALL, "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "wait", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "barn"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
        {**said, "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    assert messages(input=sent) == [
        {"role": "user", "content": "Where?\nWhen?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"a": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "wait", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "barn", "tool_call_id": "c1"},
        {"role": "tool", "content": "done", "tool_call_id": "c2"},
        {"role": "assistant", "content": "No."},
    ]


def test_two_answers_in_a_row_stay_two() -> None:
    sent = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert [message["content"] for message in messages(input=[*sent, THOUGHT, CALL])] == ["a", "b", ""]


def test_sampling_bounds_and_forms() -> None:
    chat = translated(
        max_output_tokens=9, temperature=0.5, top_p=0.9, top_k=5, seed=3, stop="x", text={"format": {"type": "text"}}
    ).chat
    assert (chat.max_completion_tokens, chat.max_tokens) == (9, None)
    assert (chat.temperature, chat.top_p, chat.top_k, chat.seed, chat.stops) == (0.5, 0.9, 5, 3, ["x"])
    form = {"type": "json_schema", "name": "s", "schema": {"type": "object"}, "strict": True}
    wanted = translated(text={"format": form}).chat.response_format
    assert wanted is not None
    assert wanted.model_dump(by_alias=True, exclude_none=True) == {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
    }


@pytest.mark.parametrize(
    ("choice", "becomes", "offered"),
    [
        (None, None, ["look", "wait"]),
        ("required", "required", ["look", "wait"]),
        ({"type": "function", "name": "look"}, {"type": "function", "function": {"name": "look"}}, ["look", "wait"]),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "wait"}]},
            "auto",
            ["wait"],
        ),
    ],
)
def test_tool_choices(choice: Any, becomes: Any, offered: list[str]) -> None:
    chat = translated(tools=[TOOL, WAIT], tool_choice=choice).chat
    found: Any = chat.tool_choice
    assert (found if found is None or isinstance(found, str) else found.model_dump()) == becomes
    assert [tool.function.name for tool in chat.tools or ()] == offered


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, (None, None)),
        ({"include": ["message.output_text.logprobs"]}, (True, 0)),
        ({"top_logprobs": 3}, (True, 3)),
        ({"top_logprobs": 0}, (None, None)),
    ],
)
def test_log_probabilities(fields: dict[str, Any], wanted: Any) -> None:
    chat = translated(**fields).chat
    assert (chat.logprobs, chat.top_logprobs) == wanted


HARMLESS: dict[str, Any] = {
    "store": False,
    "background": False,
    "truncation": "disabled",
    "service_tier": "auto",
    "metadata": {"a": "b"},
    "user": "u",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "client_metadata": {"session_id": "s"},
    "prompt_cache_options": {"mode": "implicit"},
    "max_tool_calls": 3,
    "stream_options": {"include_obfuscation": False},
    "include": ["reasoning.encrypted_content", "file_search_call.results"],
    "context_management": [],
    "reasoning": {"summary": "auto", "context": "auto", "mode": "standard"},
    "text": {"verbosity": "medium"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(name: str) -> None:
    ignored = {"metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    ignored |= {"store", "service_tier"}
    chat, plain = translated(**{name: HARMLESS[name]}).chat, translated().chat
    assert chat.model_dump(exclude=ignored) == plain.model_dump(exclude=ignored)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "not supported"),
        ({"background": True}, "background", "must be False"),
        ({"store": True}, "store", "must be False"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"moderation": {"model": "x"}}, "moderation", "not supported"),
        ({"truncation": "auto"}, "truncation", "must be"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "at most 0"),
        ({"service_tier": "flex"}, "service_tier", "must be"),
        ({"max_tokens": 5}, "max_tokens", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"messages": []}, "messages", "not a parameter"),
        ({"mood": 1}, "mood", "not a parameter"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": None}, "input", "must be"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role", "must be"),
        ({"input": [{"content": "hi"}]}, "input[0].type", "must be given"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "must be one of"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "must be one of"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "must be one of",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "given"),
        ({"input": [{**CALL, "arguments": None}]}, "input[0].arguments", "string"),
        (
            {"input": [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "cannot be read",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be one of"),
        ({"tools": [{"type": "custom", "name": "patch"}]}, "tools[0].type", "must be one of"),
        ({"tools": [{**SPACE, "tools": []}]}, "tools[0].tools", "must not be empty"),
        ({"tools": [{**SPACE, "tools": [{"type": "custom", "name": "x"}]}]}, "tools[0].tools[0].type", "function"),
        ({"tools": [{**SPACE, "tools": [TOOL, {**TOOL, "name": "a" * 60}]}]}, "tools[0].tools[1].name", "longer"),
        ({"tools": [{**TOOL, "name": "agents__look"}, SPACE]}, "tools[1].tools[0].name", "same as another"),
        ({"tools": [SPACE, {**TOOL, "name": "agents__look"}]}, "tools[1].name", "same as another"),
        (
            {"tools": [{**SPACE, "tools": [{**TOOL, "name": f"f{n}"} for n in range(128)]}, TOOL]},
            "tools",
            "at most 128",
        ),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "pattern"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "must be False"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "must be"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            },
            "tool_choice.tools[0].name",
            "not one of the tools",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "must be one of"),
        ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema", "must be given"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "must be 'medium'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "must be 'auto'"),
        ({"include": ["everything"]}, "include[0]", "must be"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "not a parameter"),
        ({"temperature": "1"}, "temperature", "valid number"),
    ],
)
def test_refusal_names_the_parameter(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        translated(**fields)
    assert refused.value.field == param
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("token_ids", "input"),
        ("messages", "input"),
        ("messages[0].content", "input[0].content"),
        ("messages[1].tool_calls[1].function.arguments", "input[2].arguments"),
        ("messages[1]", "input[1]"),
        ("stopping.max_tokens", "max_output_tokens"),
        ("sampling.temperature", "temperature"),
        ("guided.json_schema", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        ("tools", "tools"),
    ],
)
def test_errors_have_the_clients_names(field: str, name: str) -> None:
    form = {"type": "json_schema", "name": "s", "schema": {}}
    sent = [{"role": "user", "content": "hi"}, CALL, {**CALL, "call_id": "c2"}]
    assert translated(input=sent, max_output_tokens=9, text={"format": form}).name(field) == name


def test_functions_of_a_namespace_are_tools_under_both_names() -> None:
    """As Codex sends its tools for other agents, and a call of one of them in the history."""
    made = translated(tools=[TOOL, {**SPACE, "tools": [{**TOOL, "description": "Look."}, WAIT]}])
    offered = [tool.function for tool in made.chat.tools or ()]
    assert [tool.name for tool in offered] == ["look", "agents__look", "agents__wait"]
    assert [tool.description for tool in offered] == [None, "Other agents.\n\nLook.", "Other agents."]
    assert made.names == {"agents__look": ("agents", "look"), "agents__wait": ("agents", "wait")}
    called = messages(tools=[SPACE], input=[{**CALL, "namespace": "agents"}])
    assert called[0]["tool_calls"][0]["function"]["name"] == "agents__look"


def test_a_request_of_a_coding_agent_is_taken() -> None:
    """What Codex sends beside its prompt, with a model that it does not know."""
    chat = translated(
        instructions="You are an agent.",
        input=[{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        tools=[{**TOOL, "description": "Looks.", "strict": False}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning=None,
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="thread_1",
    ).chat
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert chat.parallel_tool_calls is False


def test_null_equals_absence() -> None:
    names = {field.alias or name for name, field in ResponsesRequest.model_fields.items()} - {"model", "input"}
    assert parse(ResponsesRequest, raw(**dict.fromkeys(names))) == parse(ResponsesRequest, raw())


def test_documentation_lists_every_parameter() -> None:
    documented = set(re.findall(r"`([a-z_]+)", DOCS.read_text()))
    names = {field.alias or name for name, field in ResponsesRequest.model_fields.items()}
    # Those of every door are on the page of chat completions.
    assert names - CommonFields.model_fields.keys() <= documented
