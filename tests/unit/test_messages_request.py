"""Requests of Anthropic's Messages API: what each becomes in a chat request, and the name in every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest
from tandem_frontend.anthropic.translation import Translated, hides_thinking
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.messages import for_template
from tandem_frontend.openai.request_body import parse

from tandem.errors import InvalidRequest

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "messages.md"
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "look", "input_schema": {"type": "object"}}
LATER = {"name": "wait", "input_schema": {"type": "object"}, "defer_loading": True}
SEARCHED = {
    "role": "user",
    "content": [
        {
            "type": "tool_result",
            "tool_use_id": "t1",
            "content": [{"type": "text", "text": "One."}, {"type": "tool_reference", "tool_name": "wait"}],
        }
    ],
}
CACHED = {"cache_control": {"type": "ephemeral"}}
USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "Köln"}}


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 9, "messages": [USER], **fields}).encode()


def translated(*, template: tuple[str, ...] = (), reasons: bool = False, **fields: Any) -> Translated:
    return Translated(parse(MessagesRequest, raw(**fields)), template.__contains__, reasons=reasons)


def messages(*given: Any, **fields: Any) -> list[dict[str, Any]]:
    return for_template(translated(messages=list(given), **fields).chat.messages, lambda text: text)


def test_system_as_text_and_as_blocks() -> None:
    blocks = [{"type": "text", "text": "Be brief.", **CACHED}, {"type": "text", "text": "Be kind."}]
    assert messages(USER, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert messages(USER, system=blocks)[0] == {"role": "system", "content": "Be brief.\nBe kind."}


def test_a_conversation_with_thinking_and_tools() -> None:
    """As Claude Code sends it back: several results and a text in one turn, marks of the cache, a signature."""
    found = messages(
        {"role": "user", "content": [{"type": "text", "text": "Where?", **CACHED}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
                {"type": "text", "text": "I look.", "citations": None},
                {**USE, "caller": {"type": "direct"}},
                {**USE, "id": "t2", "name": "wait", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "barn"}], **CACHED},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "And then?"},
            ],
        },
    )
    assert found == [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look", "arguments": {"where": "Köln"}}},
                {"id": "t2", "type": "function", "function": {"name": "wait", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "barn", "tool_call_id": "t1"},
        {"role": "tool", "content": "", "tool_call_id": "t2"},
        {"role": "user", "content": "And then?"},
    ]


def test_neighbouring_turns_of_one_side_are_one() -> None:
    said = {"role": "assistant", "content": "a"}
    assert [m["content"] for m in messages(USER, USER, said, said, USER)] == ["hi\nhi", "a\na", "hi"]


def test_sampling_stops_and_forms() -> None:
    chat = translated(
        temperature=1,
        top_k=5,
        stop_sequences=["x", "y"],
        metadata={"user_id": None},
        output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
    ).chat
    assert (chat.max_tokens, chat.temperature, chat.top_k, chat.stops) == (9, 1, 5, ["x", "y"])
    assert chat.response_format is not None
    assert chat.response_format.model_dump(by_alias=True)["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("choice", "becomes", "one_only"),
    [
        (None, None, False),
        ({"type": "auto", "disable_parallel_tool_use": True}, None, True),
        ({"type": "any"}, "required", False),
        ({"type": "none"}, "none", False),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}, False),
    ],
)
def test_tool_choices(choice: Any, becomes: Any, one_only: bool) -> None:
    request = translated(tools=[{**TOOL, "type": "custom", **CACHED, "strict": True}], tool_choice=choice)
    found: Any = request.chat.tool_choice
    assert (found if found is None or isinstance(found, str) else found.model_dump()) == becomes
    assert request.one_call_only is one_only
    assert request.chat.tools is not None
    (tool,) = request.chat.tools
    assert tool.model_dump(exclude_none=True)["function"] == {
        "name": "look",
        "parameters": {"type": "object"},
        "strict": True,
    }


ENABLED = {"type": "enabled", "budget_tokens": 1024}


@pytest.mark.parametrize(
    ("thinking", "template", "reasons", "kwargs"),
    [
        (None, ("enable_thinking",), True, {}),
        (ENABLED, ("enable_thinking",), True, {"enable_thinking": True}),
        (ENABLED, ("thinking",), True, {"thinking": True}),
        (ENABLED, (), True, {}),
        ({"type": "disabled"}, ("enable_thinking",), True, {"enable_thinking": False}),
        ({"type": "disabled"}, (), False, {}),
        ({"type": "adaptive"}, ("enable_thinking",), True, {}),
        ({"type": "adaptive"}, (), False, {}),
        (ENABLED, (), False, "'enabled' requires"),
        ({"type": "disabled"}, (), True, "'disabled' is not supported"),
    ],
)
def test_thinking(thinking: Any, template: tuple[str, ...], reasons: bool, kwargs: Any) -> None:
    def given() -> Any:
        return translated(template=template, reasons=reasons, thinking=thinking).chat.chat_template_kwargs

    if not isinstance(kwargs, str):
        assert given() == kwargs
        return
    with pytest.raises(InvalidRequest, match=kwargs) as refused:
        given()
    assert refused.value.field == "thinking.type"


def test_thinking_may_be_hidden() -> None:
    assert hides_thinking(parse(MessagesRequest, raw(thinking={**ENABLED, "display": "omitted"})))
    assert not hides_thinking(parse(MessagesRequest, raw(thinking={**ENABLED, "display": "summarized"})))


@pytest.mark.parametrize(
    ("effort", "template", "becomes"),
    [("low", (), "low"), ("high", (), None), ("high", ("reasoning_effort",), "high"), (None, (), None)],
)
def test_effort_is_neutral_where_it_is_the_default(effort: Any, template: tuple[str, ...], becomes: Any) -> None:
    """A chat template without a variable for it then refuses every other value."""
    assert translated(template=template, output_config={"effort": effort}).chat.reasoning_effort == becomes


HARMLESS: dict[str, Any] = {
    "metadata": {"user_id": "u"},
    "service_tier": "standard_only",
    "speed": "standard",
    "cache_control": {"type": "ephemeral"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "mcp_servers": [],
    "tools": [],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(name: str) -> None:
    chat, plain = translated(**{name: HARMLESS[name]}).chat, translated().chat
    assert chat.model_dump(exclude={name}) == plain.model_dump(exclude={name})


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be given"),
        (
            {"messages": [USER, {"role": "assistant", "content": "The answer is"}]},
            "messages[1]",
            "prefill",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
            "must be one of",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            "messages[0].content[0].type",
            "must be one of",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, USER]},
            "messages[0].content[0].type",
            "must be one of",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 1}]}]},
            "messages[0].content[0].tool_use_id",
            "string",
        ),
        ({"system": [{"type": "image"}]}, "system[0].type", "must be 'text'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "must be 'custom'"),
        ({"tools": [{"name": "look"}]}, "tools[0].input_schema", "must be given"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools", "at least one"),
        ({"tools": [TOOL, LATER], "tool_choice": {"type": "tool", "name": "wait"}}, "tool_choice.name", "deferred"),
        (
            {"tools": [TOOL], "messages": [SEARCHED]},
            "messages[0].content[0].content[1].tool_name",
            "not one of the tools",
        ),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples", "at most 0"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type", "must be one of"),
        ({"tool_choice": "auto"}, "tool_choice", "must be"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", "must be one of"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "must be given"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type", "must be"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget", "not a parameter"),
        ({"context_management": {"edits": [{"type": "x"}]}}, "context_management.edits[0].type", "must be"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers", "at most 0"),
        ({"container": "c"}, "container", "not supported"),
        ({"inference_geo": "eu"}, "inference_geo", "not supported"),
        ({"speed": "fast"}, "speed", "must be 'standard'"),
        ({"service_tier": "priority"}, "service_tier", "must be"),
        ({"stop": "x"}, "stop", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"max_completion_tokens": 2}, "max_completion_tokens", "not a parameter"),
        ({"stop_sequences": "x"}, "stop_sequences", "array"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences", "at most 16"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"mood": 1}, "mood", "not a parameter"),
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
        ("messages", "messages"),
        ("token_ids", "messages"),
        ("messages[1].content", "messages[0].content"),
        ("messages[2].tool_calls[0].function.arguments", "messages[1].content[0].input"),
        ("messages[3].content", "messages[2].content[0].content"),
        ("stopping.max_tokens", "max_tokens"),
        ("stopping.stop", "stop_sequences"),
        ("guided.json_schema", "output_config.format"),
        ("reasoning_effort", "output_config.effort"),
        ("sampling.top_k", "top_k"),
    ],
)
def test_errors_have_the_clients_names(field: str, name: str) -> None:
    turns = [
        USER,
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "barn"}]},
    ]
    form = {"format": {"type": "json_schema", "schema": {}}}
    assert translated(system="x", messages=turns, output_config=form).name(field) == name


def test_a_deferred_tool_is_in_the_prompt_after_a_search_has_named_it() -> None:
    """As Claude Code loads tools: the result of its search is a reference, and the tool was there all the time."""
    before = translated(tools=[TOOL, LATER])
    assert [tool.function.name for tool in before.chat.tools or ()] == ["look"]
    after = translated(tools=[TOOL, LATER], messages=[USER, {"role": "assistant", "content": [USE]}, SEARCHED])
    assert [tool.function.name for tool in after.chat.tools or ()] == ["look", "wait"]
    assert for_template(after.chat.messages, lambda text: text)[-1]["content"] == "One.\nFound the tool wait."


def test_a_request_of_a_coding_agent_is_taken() -> None:
    """What Claude Code sends beside its prompt, with a model of another name."""
    request = translated(
        stream=True,
        temperature=1,
        system=[{"type": "text", "text": "You are an agent.", **CACHED}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", **CACHED}]}],
        tools=[{**TOOL, "description": "Looks.", "eager_input_streaming": True, **CACHED}],
        metadata={"user_id": "user_1"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert [message.role for message in request.chat.messages] == ["system", "user"]
    assert request.chat.chat_template_kwargs == {}


def test_count_tokens_needs_no_max_tokens() -> None:
    body = {"model": "m", "messages": [USER]}
    assert parse(CountTokensRequest, json.dumps(body).encode()).max_tokens is None
    with pytest.raises(InvalidRequest):
        parse(MessagesRequest, json.dumps(body).encode())


def test_documentation_lists_every_parameter() -> None:
    documented = set(re.findall(r"`([a-z_]+)", DOCS.read_text()))
    names = {field.alias or name for name, field in MessagesRequest.model_fields.items()}
    # Those of every door are on the page of chat completions.
    assert names - CommonFields.model_fields.keys() <= documented
