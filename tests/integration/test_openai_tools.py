"""Tool calls and reasoning through the whole way: the openai client, a real Envoy, a parser host, the real engine."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import openai
import pytest

from tandem.local_cluster.cluster import LocalCluster

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(240),
]

PARAMETERS = {
    "type": "object",
    "properties": {"where": {"enum": ["bridge", "barn"]}, "twice": {"type": "boolean"}},
    "required": ["where", "twice"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "properties": {}}}},
]
LOOK: Any = {"type": "function", "function": {"name": "look"}}
ASKED: dict[str, Any] = {
    "model": "tool-model",
    "messages": [{"role": "user", "content": "Where did Mia hide the red key?"}],
    "temperature": 0,
    "max_tokens": 120,
}


@pytest.fixture
def client(tool_cluster: LocalCluster) -> Any:
    assert tool_cluster.edge is not None
    url = f"http://{tool_cluster.edge.address}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one:
        yield one


@pytest.mark.parametrize("choice", [LOOK, "required"])
def test_a_forced_call_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    tools = TOOLS[:1]
    said = client.chat.completions.create(**ASKED, tools=tools, tool_choice=choice, parallel_tool_calls=False)
    (call,) = said.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["where"] in {"bridge", "barn"}
    assert said.choices[0].finish_reason == "tool_calls"
    assert said.choices[0].message.content is None
    with client.chat.completions.stream(**ASKED, tools=tools, tool_choice=choice, parallel_tool_calls=False) as stream:
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == ("look", call.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"


def test_arguments_are_streamed_in_pieces(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice=LOOK, stream=True)
    calls = [call for chunk in chunks for call in (chunk.choices[0].delta.tool_calls or []) if call.index == 0]
    assert calls[0].id
    assert calls[0].function is not None
    assert calls[0].function.name == "look"
    fragments = [call.function.arguments or "" for call in calls[1:] if call.function]
    assert len(fragments) >= 1
    assert set(json.loads("".join(fragments))) == {"where", "twice"}
    assert not any(call.id for call in calls[1:])


def test_a_call_and_its_answer_are_history(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "barn"}'}}
    history: list[Any] = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Mia hid the red key in the old barn."},
    ]
    plain = client.chat.completions.create(**ASKED, tools=TOOLS)
    said = client.chat.completions.create(**{**ASKED, "messages": history}, tools=TOOLS)
    assert said.usage is not None
    assert plain.usage is not None
    assert said.usage.prompt_tokens > plain.usage.prompt_tokens + 20


def test_tools_reach_the_model_unless_it_may_not_call(client: openai.OpenAI) -> None:
    def prompt_tokens(**more: Any) -> int:
        usage = client.chat.completions.create(**{**ASKED, "max_tokens": 1}, **more).usage
        assert usage is not None
        return int(usage.prompt_tokens)

    assert prompt_tokens(tools=TOOLS) > prompt_tokens() == prompt_tokens(tools=TOOLS, tool_choice="none")


def test_a_named_tool_is_the_only_one_in_the_prompt(client: openai.OpenAI) -> None:
    def prompt_tokens(tools: list[Any]) -> int:
        said = client.chat.completions.create(**{**ASKED, "max_tokens": 1}, tools=tools, tool_choice=LOOK)
        assert said.usage is not None
        return int(said.usage.prompt_tokens)

    assert prompt_tokens(TOOLS) == prompt_tokens(TOOLS[:1])


def test_a_tool_cannot_end_the_turn_it_is_described_in(client: openai.OpenAI) -> None:
    def prompt_tokens(description: str) -> int:
        tool: Any = {"type": "function", "function": {"name": "look", "description": description}}
        said = client.chat.completions.create(**{**ASKED, "max_tokens": 1}, tools=[tool])
        assert said.usage is not None
        return int(said.usage.prompt_tokens)

    # A control token is one token; taken apart it is many.
    assert prompt_tokens("<|end|>") > prompt_tokens("a") + 3


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_separate_from_content(client: openai.OpenAI, stream: bool) -> None:
    extra = {"regex": "<think>(yes|no)</think>(barn|bridge)"}
    said: Any = client.chat.completions.create(**ASKED, extra_body=extra, stream=stream)
    if stream:
        made = [chunk.choices[0].delta for chunk in said]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in made)
        content = "".join(delta.content or "" for delta in made)
    else:
        reasoning, content = said.choices[0].message.reasoning_content, said.choices[0].message.content
    assert reasoning in {"yes", "no"}
    assert content in {"barn", "bridge"}


@pytest.mark.parametrize("tools", [{}, {"tools": TOOLS}])
def test_json_is_content_beside_a_reasoning_parser(client: openai.OpenAI, tools: Any) -> None:
    schema = {"type": "object", "properties": {"place": {"enum": ["barn", "bridge"]}}, "required": ["place"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    said = client.chat.completions.create(**{**ASKED, "max_tokens": 60}, response_format=form, **tools)
    assert json.loads(said.choices[0].message.content or "")["place"] in {"barn", "bridge"}
    plain = client.chat.completions.create(**ASKED, extra_body={"regex": "barn|bridge"}, **tools)
    assert plain.choices[0].message.content in {"barn", "bridge"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": LOOK, "extra_body": {"regex": "a"}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
def test_what_cannot_be_called_is_named(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, **fields)
    assert refused.value.param == param


def test_half_a_surrogate_pair_in_an_argument_is_replaced(client: openai.OpenAI) -> None:
    """Once it ended the parser host, every stream in it, and those of two more frontends."""
    text = '<tool_call>\n{"name": "look", "arguments": {"where": "\\ud83d"}}\n</tool_call>'
    asked = {
        **ASKED,
        "tools": TOOLS,
        "extra_body": {"regex": re.escape(text), "chat_template_kwargs": {"enable_thinking": False}},
    }
    said = client.chat.completions.create(**asked)
    (call,) = said.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"where": "\ufffd"}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
