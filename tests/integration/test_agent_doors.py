"""Responses and Messages on the real engine: openai, the Agents SDK and anthropic, a real Envoy, grammars of tools."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import anthropic
import openai
import pytest
import pytest_asyncio
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from agents.agent import StopAtTools
from openai.types.responses import ResponseFunctionToolCall

from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.test_simulated_cluster import idle

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(240),
]

set_tracing_disabled(True)

MODEL = "tool-model"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"where": {"enum": ["bridge", "barn"]}, "twice": {"type": "boolean"}},
    "required": ["where", "twice"],
    "additionalProperties": False,
}
QUESTION = "Where did Mia hide the red key?"
ASKED: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 120}
SAID: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 120,
    "extra_body": {"temperature": 0},
}


@pytest_asyncio.fixture(loop_scope="session")
async def responses(tool_cluster: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    assert tool_cluster.edge is not None
    url = f"http://{tool_cluster.edge.address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def messages(tool_cluster: LocalCluster) -> AsyncIterator[anthropic.AsyncAnthropic]:
    assert tool_cluster.edge is not None
    url = f"http://{tool_cluster.edge.address}"
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as one:
        yield one


async def test_three_doors_write_the_same_text(
    responses: openai.AsyncOpenAI, messages: anthropic.AsyncAnthropic
) -> None:
    """One translation: the same prompt, so greedily the same text, the same count of its tokens."""
    # Without it the model may end at once: it was not trained on this template.
    some: dict[str, Any] = {"min_tokens": 8}
    off = {**some, "chat_template_kwargs": {"enable_thinking": False}}
    response = await responses.responses.create(**ASKED, extra_body=off)
    more = {**SAID, "extra_body": {**SAID["extra_body"], **some}}
    message = await messages.messages.create(**more, thinking={"type": "disabled"})
    chat = await responses.chat.completions.create(
        model=MODEL, messages=SAID["messages"], temperature=0, max_tokens=120, extra_body=off
    )
    text = (chat.choices[0].message.content or "").strip()
    assert text
    assert response.output_text.strip() == text
    assert [block.text.strip() for block in message.content if block.type == "text"] == [text]
    assert chat.usage is not None
    assert response.usage is not None
    read = message.usage.cache_read_input_tokens or 0
    counted = await messages.messages.count_tokens(
        model=MODEL, messages=SAID["messages"], thinking={"type": "disabled"}
    )
    prompts = {chat.usage.prompt_tokens, response.usage.input_tokens, message.usage.input_tokens + read}
    assert prompts == {counted.input_tokens}


async def test_a_forced_call_of_a_response(responses: openai.AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": PARAMETERS, "strict": True}
    choice: Any = {"type": "function", "name": "look"}
    more: dict[str, Any] = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False}
    said = await responses.responses.create(**ASKED, **more)
    call = said.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert set(json.loads(call.arguments)) == {"where", "twice"}
    async with responses.responses.stream(**ASKED, **more) as stream:
        final = await stream.get_final_response()
    streamed = final.output[-1]
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == ("look", call.arguments)


async def test_a_forced_call_of_a_message(messages: anthropic.AsyncAnthropic) -> None:
    tool: Any = {"name": "look", "input_schema": PARAMETERS}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    async with messages.messages.stream(**SAID, tools=[tool], tool_choice=choice) as stream:
        final = await stream.get_final_message()
    call = final.content[-1]
    assert call.type == "tool_use"
    assert set(call.input) == {"where", "twice"}
    assert final.stop_reason == "tool_use"


async def test_the_agents_sdk_runs_a_tool_with_a_strict_schema(responses: openai.AsyncOpenAI) -> None:
    calls = []

    @function_tool
    def look(where: Literal["bridge", "barn"]) -> str:
        """Look there."""
        calls.append(where)
        return f"The key is in the {where}."

    served = OpenAIResponsesModel(MODEL, responses)
    finder = Agent(
        name="finder",
        model=served,
        tools=[look],
        tool_use_behavior=StopAtTools(stop_at_tool_names=["look"]),
        model_settings=ModelSettings(temperature=0, tool_choice="required", parallel_tool_calls=False),
    )
    found = await Runner.run(finder, QUESTION)
    assert len(calls) == 1
    assert found.final_output == f"The key is in the {calls[0]}."


async def test_a_client_that_leaves_ends_the_engines_work(
    tool_cluster: LocalCluster, responses: openai.AsyncOpenAI, messages: anthropic.AsyncAnthropic
) -> None:
    await assert_eventually(lambda: idle(tool_cluster), bool, within_s=5, what="an idle engine at the start")
    long: dict[str, Any] = {"ignore_eos": True}
    response = await responses.responses.create(
        **{**ASKED, "max_output_tokens": 1500}, stream=True, extra_body={**long}
    )
    async for event in response:
        if event.type == "response.reasoning_text.delta":
            break
    await response.close()
    await assert_eventually(lambda: idle(tool_cluster), bool, within_s=2, every_s=0.02, what="an idle engine")
    message = await messages.messages.create(**{**SAID, "max_tokens": 1500, "extra_body": long}, stream=True)
    async for event_of_message in message:
        if event_of_message.type == "content_block_delta":
            break
    await message.close()
    await assert_eventually(lambda: idle(tool_cluster), bool, within_s=2, every_s=0.02, what="an idle engine")
