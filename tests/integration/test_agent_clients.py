"""SDKs of agents, unmodified, against a real Envoy: openai's Responses, the Agents SDK, anthropic; also in JavaScript.

The model's text is scripted: no small model calls tools as a test needs it. Real engines: test_agent_doors.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
import pytest_asyncio
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from agents.exceptions import ModelBehaviorError
from openai.types.responses import ResponseFunctionToolCall, ResponseReasoningItem
from pydantic import BaseModel

from tandem.api.types.v1 import generation_pb2
from tandem.errors import LegFailed
from tandem.local_cluster.child_process import ClusterProcess
from tests.integration.conftest import REPOSITORY
from tests.integration.support.edge_host import edge
from tests.integration.support.scripted_model import CACHED_TOKENS, MODEL, Script, ScriptedModel, scripted_model

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.timeout(180),
]

set_tracing_disabled(True)

LENGTH = generation_pb2.FINISH_REASON_LENGTH
KEY = "sk-agent-0123456789abcdef"
THOUGHT = "I look first."
CALL = '<tool_call>\n{"name": "look", "arguments": {"where": "barn"}}\n</tool_call>'
LOOKS = f"{THOUGHT}</think>\n\n{CALL}"
ANSWER = "Mia hid it in the barn."
SAYS = f"I know now.</think>\n\n{ANSWER}"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"where": {"type": "string"}},
    "required": ["where"],
    "additionalProperties": False,
}
RESPONSES_TOOLS: list[Any] = [{"type": "function", "name": "look", "parameters": PARAMETERS, "strict": False}]
ANTHROPIC_TOOLS: list[Any] = [{"name": "look", "description": "Look there.", "input_schema": PARAMETERS}]


class Where(BaseModel):
    """A structured answer."""

    found: bool
    colour: Literal["red", "blue"]


FOUND = '{"found": true, "colour": "red"}'
NO_THOUGHT: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def model(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedModel]:
    async with scripted_model(tmp_path_factory.mktemp("model")) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def process(model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterProcess]:
    logs = tmp_path_factory.mktemp("edge")
    (logs / "keys").write_text(f"agent: {KEY}\n")
    async with edge(logs, model.address, api_keys=logs / "keys") as started:
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def responses(process: ClusterProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{process.address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def messages(process: ClusterProcess) -> AsyncIterator[anthropic.AsyncAnthropic]:
    url = f"http://{process.address}"
    async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as one:
        yield one


ASKED: dict[str, Any] = {"model": MODEL, "input": "Where is the key?", "max_output_tokens": 200}
SAID: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Where is the key?"}],
    "max_tokens": 200,
}


async def test_a_response_with_reasoning(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(SAYS)
    said = await responses.responses.create(**ASKED, instructions="Be brief.", include=["reasoning.encrypted_content"])
    assert said.output_text == ANSWER
    assert [item.type for item in said.output] == ["reasoning", "message"]
    thought = said.output[0]
    assert isinstance(thought, ResponseReasoningItem)
    assert thought.content is not None
    assert thought.content[0].text == "I know now."
    assert said.usage is not None
    assert said.usage.input_tokens_details.cached_tokens == CACHED_TOKENS
    assert said.usage.output_tokens_details.reasoning_tokens > 0
    assert (said.status, said.store) == ("completed", False)
    assert re.search(r"Be brief\..*Where is the key\?", model.prompts[0], re.DOTALL)


async def test_a_conversation_with_tools_is_sent_back_whole(
    model: ScriptedModel, responses: openai.AsyncOpenAI
) -> None:
    """As OpenAI's documentation says to do it without a stored response: all items, and the results behind them."""
    model.answers(LOOKS, SAYS)
    history: list[Any] = [{"role": "user", "content": "Where is the key?"}]
    first = await responses.responses.create(**{**ASKED, "input": history}, tools=RESPONSES_TOOLS, store=False)
    call = first.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments), call.status) == ("look", {"where": "barn"}, "completed")
    history += [item.model_dump() for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "The key is here."})
    second = await responses.responses.create(**{**ASKED, "input": history}, tools=RESPONSES_TOOLS, store=False)
    assert second.output_text == ANSWER
    assert THOUGHT in model.prompts[1]
    assert '{"name": "look", "arguments": {"where": "barn"}}' in model.prompts[1]
    assert "The key is here." in model.prompts[1]


async def test_a_streamed_response(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(LOOKS)
    events = [event async for event in await responses.responses.create(**ASKED, tools=RESPONSES_TOOLS, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"where": "barn"}
    thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == THOUGHT


async def test_the_stream_helper_of_openai(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(FOUND)
    async with responses.responses.stream(**ASKED, text_format=Where, extra_body=NO_THOUGHT) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert Where.model_validate_json("".join(deltas)) == final.output_parsed == Where(found=True, colour="red")
    (request,) = model.generation.requests
    assert json.loads(request.guided.json_schema)["properties"]["colour"]["enum"] == ["red", "blue"]


async def test_parse_of_openai(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(FOUND)
    parsed = await responses.responses.parse(**ASKED, text_format=Where, extra_body=NO_THOUGHT)
    assert parsed.output_parsed == Where(found=True, colour="red")


async def test_the_token_limit_of_a_response(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(Script("x</think>Mia hid", LENGTH))
    said = await responses.responses.create(**ASKED)
    assert (said.status, said.incomplete_details and said.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert said.output_text == "Mia hid"


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_of_responses(model: ScriptedModel, responses: openai.AsyncOpenAI, stream: bool) -> None:
    fields: list[tuple[dict[str, Any], str]] = [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"temperature": 9}, "temperature"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "word " * 5_000}, "input"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ]
    for more, param in fields:
        model.answers("x")
        with pytest.raises(openai.BadRequestError) as refused:
            await responses.responses.create(**{**ASKED, **more}, stream=stream)
        assert refused.value.param == param, more


async def test_a_failure_of_a_streamed_response(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(Script("x</think>Mia hid", failure=LegFailed("broken", role="decode")))
    seen: list[str] = []

    async def read() -> None:
        async for event in await responses.responses.create(**ASKED, stream=True):
            seen.append(event.type)

    with pytest.raises(openai.APIError, match="broken"):
        await read()
    assert "response.output_item.added" in seen
    assert "response.completed" not in seen


@function_tool
def look(where: str) -> str:
    """Look there.

    Args:
        where: the place.
    """
    return f"The key is in the {where}."


def agent(client: openai.AsyncOpenAI, **more: Any) -> Agent[Any]:
    served = OpenAIResponsesModel(MODEL, client)
    return Agent(name="finder", instructions="Find things.", model=served, tools=[look], **more)


async def test_the_agents_sdk_calls_a_tool(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    # Its tools are strict, which a grammar of the engine enforces; here a script writes what the grammar would allow.
    model.answers(LOOKS, SAYS)
    found = await Runner.run(agent(responses), "Where is the key?")
    assert found.final_output == ANSWER
    assert "The key is in the barn." in model.prompts[1]


async def test_the_agents_sdk_streams(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(LOOKS, SAYS)
    run = Runner.run_streamed(agent(responses, model_settings=ModelSettings(parallel_tool_calls=False)), "Where?")
    events = [event async for event in run.stream_events()]
    assert run.final_output == ANSWER
    items = [event.name for event in events if event.type == "run_item_stream_event"]
    assert [name for name in items if name.startswith("tool")] == ["tool_called", "tool_output"]
    raw = [event.data.type for event in events if event.type == "raw_response_event"]
    assert raw.count("response.completed") == 2


async def test_the_agents_sdk_with_an_output_type(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(FOUND)
    served = OpenAIResponsesModel(MODEL, responses)
    settings = ModelSettings(extra_body=NO_THOUGHT)
    finder = Agent(name="finder", model=served, output_type=Where, model_settings=settings)
    found = await Runner.run(finder, "Where is the key?")
    assert found.final_output == Where(found=True, colour="red")


async def test_the_agents_sdk_learns_of_a_failure(model: ScriptedModel, responses: openai.AsyncOpenAI) -> None:
    model.answers(Script("x</think>Mia hid", failure=LegFailed("broken", role="decode")))
    run = Runner.run_streamed(agent(responses), "Where?")
    with pytest.raises((openai.APIError, ModelBehaviorError)):
        _ = [event async for event in run.stream_events()]


async def test_a_message_with_thinking(model: ScriptedModel, messages: anthropic.AsyncAnthropic) -> None:
    model.answers(SAYS)
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    said = await messages.messages.create(**SAID, system="Be brief.", thinking=thinking)
    thought, text = said.content
    assert thought.type == "thinking"
    assert text.type == "text"
    assert (thought.thinking, text.text) == ("I know now.", ANSWER)
    assert said.stop_reason == "end_turn"
    assert said.usage.cache_read_input_tokens == CACHED_TOKENS
    (request,) = model.generation.requests
    assert said.usage.input_tokens == len(request.token_ids.ids) - CACHED_TOKENS
    assert said._request_id
    assert re.search(r"Be brief\..*Where is the key\?", model.prompts[0], re.DOTALL)


async def test_thinking_is_turned_off_in_the_template(model: ScriptedModel, messages: anthropic.AsyncAnthropic) -> None:
    model.answers(ANSWER)
    said = await messages.messages.create(**SAID, thinking={"type": "disabled"})
    assert [block.type for block in said.content] == ["text"]
    assert model.prompts[0].endswith("<think>\n\n</think>\n\n")


async def test_a_message_that_calls_a_tool_and_its_result(
    model: ScriptedModel, messages: anthropic.AsyncAnthropic
) -> None:
    model.answers(LOOKS, SAYS)
    first = await messages.messages.create(**SAID, tools=ANTHROPIC_TOOLS)
    call = first.content[-1]
    assert call.type == "tool_use"
    assert (call.name, call.input, first.stop_reason) == ("look", {"where": "barn"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "The key is here."}
    history: list[Any] = [
        *SAID["messages"],
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = await messages.messages.create(**{**SAID, "messages": history}, tools=ANTHROPIC_TOOLS)
    assert second.stop_reason == "end_turn"
    assert THOUGHT in model.prompts[1]
    assert "The key is here." in model.prompts[1]


async def test_a_streamed_message(model: ScriptedModel, messages: anthropic.AsyncAnthropic) -> None:
    model.answers(LOOKS)
    async with messages.messages.stream(**SAID, tools=ANTHROPIC_TOOLS) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert {"thinking", "input_json"} <= set(kinds), "the SDK's own events of what it has put together"
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    assert final.content[-1].input == {"where": "barn"}  # type: ignore[union-attr]
    assert final.stop_reason == "tool_use"
    assert final.usage.cache_read_input_tokens == CACHED_TOKENS
    assert final.usage.output_tokens > 0


@pytest.mark.parametrize(
    ("script", "reason", "sequence"),
    [
        (Script("x</think>Mia", stop="###"), "stop_sequence", "###"),
        (Script("x</think>Mia", LENGTH), "model_context_window_exceeded", None),
        (Script("x</think>" + "Mia " * 400, LENGTH), "max_tokens", None),
    ],
)
async def test_stop_reasons(
    model: ScriptedModel, messages: anthropic.AsyncAnthropic, script: Script, reason: str, sequence: str | None
) -> None:
    model.answers(script)
    said = await messages.messages.create(**SAID, stop_sequences=["###"])
    assert (said.stop_reason, said.stop_sequence) == (reason, sequence)
    assert list(model.generation.requests[0].stopping.stop) == ["###"]


async def test_a_structured_message_through_the_beta_client(
    model: ScriptedModel, messages: anthropic.AsyncAnthropic
) -> None:
    """Under client.beta the SDK adds a query parameter and a header."""
    model.answers(FOUND, FOUND)
    schema = {**Where.model_json_schema(), "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "schema": schema}}
    off: Any = {"type": "disabled"}
    betas: Any = ["structured-outputs-2025-11-13"]
    said = await messages.beta.messages.create(**SAID, output_config=form, thinking=off, betas=betas)
    assert Where.model_validate_json(said.content[-1].text) == Where(found=True, colour="red")
    parsed = await messages.messages.parse(**SAID, output_format=Where, thinking=off)
    assert parsed.parsed_output == Where(found=True, colour="red")


async def test_tokens_are_counted_as_they_are_generated_from(
    model: ScriptedModel, messages: anthropic.AsyncAnthropic
) -> None:
    model.answers(SAYS)
    prompt = {name: SAID[name] for name in ("model", "messages")}
    counted = await messages.messages.count_tokens(**prompt, system="Be brief.", tools=ANTHROPIC_TOOLS)
    assert not model.generation.requests
    await messages.messages.create(**SAID, system="Be brief.", tools=ANTHROPIC_TOOLS)
    assert counted.input_tokens == len(model.generation.requests[0].token_ids.ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_of_messages(model: ScriptedModel, messages: anthropic.AsyncAnthropic, stream: bool) -> None:
    fields: list[tuple[dict[str, Any], str]] = [
        ({"extra_body": {"temperature": 9}}, "temperature: must be"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, r"tools\[0\].type: must be"),
        ({"output_config": {"effort": "low"}}, "output_config.effort: "),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"messages": [{"role": "user", "content": "word " * 5_000}]}, "messages: "),
        ({"container": "c"}, "container: is not supported"),
    ]
    for more, words in fields:
        model.answers("x")
        with pytest.raises(anthropic.BadRequestError, match=words) as refused:
            await messages.messages.create(**{**SAID, **more}, stream=stream)
        body: Any = refused.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    with pytest.raises(anthropic.NotFoundError):
        await messages.messages.create(**{**SAID, "model": "claude"}, stream=stream)
    with pytest.raises(anthropic.AuthenticationError):
        await messages.with_options(api_key="sk-unknown-0123456789").messages.create(**SAID, stream=stream)


async def test_a_failure_of_a_streamed_message(model: ScriptedModel, messages: anthropic.AsyncAnthropic) -> None:
    model.answers(Script("x</think>Mia hid", failure=LegFailed("broken", role="decode")))
    with pytest.raises(anthropic.APIStatusError, match="broken") as failed:
        await drain(messages)
    body: Any = failed.value.body
    assert body["error"]["type"] == "overloaded_error"


async def drain(messages: anthropic.AsyncAnthropic) -> None:
    async with messages.messages.stream(**SAID) as stream:
        async for _ in stream:
            pass


async def test_the_npm_packages_of_both(model: ScriptedModel, process: ClusterProcess, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "tests" / "clients", tmp_path, dirs_exist_ok=True)
    await run(tmp_path, "npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error")
    model.answers(SAYS, LOOKS)
    seen = json.loads(await run(tmp_path, "node", "messages.mjs", f"http://{process.address}", KEY, MODEL))
    assert seen["whole"] == ANSWER
    assert seen["call"] == {"name": "look", "input": {"where": "barn"}}
    assert (seen["stopReason"], seen["events"][0], seen["events"][-1]) == ("tool_use", "message_start", "message_stop")
    assert seen["tokens"] > 0
    assert seen["refused"] == {"kind": "BadRequestError", "status": 400, "type": "invalid_request_error"}

    model.answers(SAYS, LOOKS)
    seen = json.loads(await run(tmp_path, "node", "responses.mjs", f"http://{process.address}/v1", KEY, MODEL))
    assert seen["whole"] == ANSWER
    assert seen["call"] == {"name": "look", "arguments": {"where": "barn"}}
    assert (seen["events"][0], seen["events"][-1]) == ("response.created", "response.completed")
    assert seen["refused"] == {"kind": "BadRequestError", "status": 400, "param": "previous_response_id"}


async def run(directory: Path, *command: str) -> str:
    child = await asyncio.create_subprocess_exec(
        *command, cwd=directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    stdout, stderr = await child.communicate()
    assert child.returncode == 0, stderr.decode()
    return stdout.decode()
