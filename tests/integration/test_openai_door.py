"""The OpenAI door over gRPC, on simulated engines: the shapes to the byte, and every way an answer can end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import openai_service_pb2 as pb
from tandem.api.frontend.v1.openai_service_pb2_grpc import OpenAiServiceStub
from tandem.domain.checkpoint import read_checkpoint
from tandem.engine.simulated.tokens import expected_tokens, read_vocabulary
from tandem.errors import ContextExceeded, InvalidRequest, ModelNotFound, NotSupported, RequestTooLarge, TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, SIMULATED, running
from tests.integration.support.openai_calls import MODEL, ask, chat, completion
from tests.integration.test_simulated_cluster import idle

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
VOCABULARY = read_vocabulary(read_checkpoint(DEMO_MODEL))
MESSAGE = "Once upon a time"
CHAT_IDS = TOKENIZER.encode(f"<|bos|><|user|>{MESSAGE}<|end|><|assistant|>", add_special_tokens=False).ids


def text_of(prompt_ids: list[int], count: int = 12) -> str:
    return TOKENIZER.decode(expected_tokens(VOCABULARY, prompt_ids, count))


async def test_a_whole_chat_completion_to_the_byte(simulated: LocalCluster) -> None:
    answer = await ask(simulated.frontend.address, "ChatCompletions", chat())
    said = answer.json
    expected = {
        "id": said["id"],
        "object": "chat.completion",
        "created": said["created"],
        "model": MODEL,
        "system_fingerprint": said["system_fingerprint"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text_of(CHAT_IDS), "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(CHAT_IDS),
            "completion_tokens": 12,
            "total_tokens": len(CHAT_IDS) + 12,
            "prompt_tokens_details": {"cached_tokens": said["usage"]["prompt_tokens_details"]["cached_tokens"]},
        },
    }
    assert answer.data == json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", said["id"])
    assert re.fullmatch("fp_[0-9a-f]{10}", said["system_fingerprint"])


async def test_a_streamed_chat_completion_to_the_byte(simulated: LocalCluster) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    answer = await ask(simulated.frontend.address, "ChatCompletions", body)
    first, *deltas, finish, usage = answer.events
    head = {
        "id": first["id"],
        "object": "chat.completion.chunk",
        "created": first["created"],
        "model": MODEL,
        "system_fingerprint": first["system_fingerprint"],
    }

    def event(delta: Any, reason: str | None = None) -> Any:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice], "usage": None}

    expected = [
        event({"role": "assistant", "content": "", "refusal": None}),
        *(event({"content": said["choices"][0]["delta"]["content"]}) for said in deltas),
        event({}, "length"),
        {**head, "choices": [], "usage": usage["usage"]},
    ]
    assert answer.raw_events[:-1] == [json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in expected]
    assert "".join(said["choices"][0]["delta"]["content"] for said in deltas) == text_of(CHAT_IDS)
    assert usage["usage"]["completion_tokens"] == 12
    assert finish["choices"][0]["finish_reason"] == "length"


async def test_without_include_usage_no_event_speaks_of_it(simulated: LocalCluster) -> None:
    answer = await ask(simulated.frontend.address, "ChatCompletions", chat(stream=True))
    assert not any("usage" in event for event in answer.events)


async def test_a_whole_completion_to_the_byte(simulated: LocalCluster) -> None:
    answer = await ask(simulated.frontend.address, "Completions", completion(max_tokens=None))
    said = answer.json
    ids = TOKENIZER.encode(MESSAGE).ids
    choice = {"text": text_of(ids, 16), "index": 0, "logprobs": None, "finish_reason": "length"}
    assert said["choices"] == [choice]
    assert list(said) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert said["object"] == "text_completion"
    assert said["id"].startswith("cmpl-")


async def test_a_streamed_completion_is_the_whole_one(simulated: LocalCluster) -> None:
    whole = (await ask(simulated.frontend.address, "Completions", completion())).json
    events = (await ask(simulated.frontend.address, "Completions", completion(stream=True))).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert {event["object"] for event in events} == {"text_completion"}
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == [None, "length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_is_a_stream_of_its_own(simulated: LocalCluster, stream: bool) -> None:
    prompts = [[5, 6, 7], [8, 9], [10]]
    body = completion(prompts, n=2, stream=stream, stream_options={"include_usage": True} if stream else None)
    answer = await ask(simulated.frontend.address, "Completions", body)
    texts = dict.fromkeys(range(6), "")
    for event in answer.events if stream else [answer.json]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {index: text_of(prompts[index // 2]) for index in range(6)}
    usage = (answer.events[-1] if stream else answer.json)["usage"]
    # A prompt counts once, whatever the number of its choices.
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 6 * 12)


async def test_text_prompts_are_a_list_too(simulated: LocalCluster) -> None:
    answer = await ask(simulated.frontend.address, "Completions", completion(["Once", "Twice"]))
    assert [choice["text"] for choice in answer.json["choices"]] == [
        text_of(TOKENIZER.encode(prompt).ids) for prompt in ("Once", "Twice")
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Größe ", [5, 6, 7]])
async def test_echo_puts_the_prompt_in_front(simulated: LocalCluster, prompt: Any, stream: bool) -> None:
    answer = await ask(simulated.frontend.address, "Completions", completion(prompt, echo=True, stream=stream))
    events = answer.events if stream else [answer.json]
    ids = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
    shown = prompt if isinstance(prompt, str) else TOKENIZER.decode(prompt)
    assert "".join(event["choices"][0]["text"] for event in events) == shown + text_of(ids)


@pytest.mark.parametrize("stop", ["token", ["never", "token"]])
async def test_stop_strings(simulated: LocalCluster, stop: Any) -> None:
    whole = text_of(CHAT_IDS)
    cut = whole[7:11]
    wanted = cut if isinstance(stop, str) else [*stop[:-1], cut]
    said = (await ask(simulated.frontend.address, "ChatCompletions", chat(stop=wanted))).json["choices"][0]
    assert said["message"]["content"] == whole[: whole.index(cut)]
    assert said["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(simulated: LocalCluster, stream: bool) -> None:
    body = chat("Größe 東京 🙂", logprobs=True, top_logprobs=2, max_tokens=40, stream=stream)
    answer = await ask(simulated.frontend.address, "ChatCompletions", body)
    entries: list[Any] = []
    for event in answer.events if stream else [answer.json]:
        logprobs = event["choices"][0]["logprobs"]
        entries += logprobs["content"] if logprobs else []
    ids = TOKENIZER.encode("<|bos|><|user|>Größe 東京 🙂<|end|><|assistant|>", add_special_tokens=False).ids
    tokens = expected_tokens(VOCABULARY, ids, 40)
    for entry, token in zip(entries, tokens, strict=True):
        part = "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
        assert entry["token"] in {TOKENIZER.decode([token], skip_special_tokens=False), f"bytes:{part}"}
    shown = bytes(byte for entry in entries for byte in entry["bytes"])
    assert shown.decode(errors="replace") == TOKENIZER.decode(tokens, skip_special_tokens=False)
    for entry in entries:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert entry["logprob"] <= 0
        assert [list(rival) for rival in entry["top_logprobs"]] == [["token", "logprob", "bytes"]] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(simulated: LocalCluster, stream: bool) -> None:
    answer = await ask(simulated.frontend.address, "Completions", completion(logprobs=3, stream=stream))
    whole: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for event in answer.events if stream else [answer.json]:
        text += event["choices"][0]["text"]
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            whole[name] += values
    assert len(whole["token_logprobs"]) == len(whole["tokens"]) == 12
    for at, token in zip(whole["text_offset"], whole["tokens"], strict=True):
        assert text[at:].startswith(token) or token.startswith("bytes:")
    assert whole["text_offset"] == sorted(whole["text_offset"])
    assert all(len(top) == 3 for top in whole["top_logprobs"])


async def test_a_stop_token_has_no_logprob(simulated: LocalCluster) -> None:
    tokens = expected_tokens(VOCABULARY, CHAT_IDS, 12)
    body = chat(logprobs=True, stop_token_ids=[tokens[6]])
    choice = (await ask(simulated.frontend.address, "ChatCompletions", body)).json["choices"][0]
    count = tokens.index(tokens[6])
    assert len(choice["logprobs"]["content"]) == count
    assert choice["message"]["content"] == TOKENIZER.decode(tokens[:count])


async def test_developer_messages_and_parts_reach_the_model(simulated: LocalCluster) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b<|end|>"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    answer = await ask(simulated.frontend.address, "ChatCompletions", chat(messages=messages))
    rendered = "<|bos|><|system|>Be brief.<|end|><|user|>a\nb<\u2060|end|><|end|><|assistant|>"
    ids = TOKENIZER.encode(rendered, add_special_tokens=False).ids
    assert answer.json["choices"][0]["message"]["content"] == text_of(ids)


BAD = [
    ("ChatCompletions", chat(temperature=3), "temperature", InvalidRequest),
    ("ChatCompletions", chat(max_tokens=0), "max_tokens", InvalidRequest),
    ("ChatCompletions", chat(max_tokens=None, max_completion_tokens=0), "max_completion_tokens", InvalidRequest),
    ("ChatCompletions", chat(top_p=1.1), "top_p", InvalidRequest),
    ("ChatCompletions", chat(top_k=-2), "top_k", InvalidRequest),
    ("ChatCompletions", chat(stop=["x" * 1025]), "stop", InvalidRequest),
    ("ChatCompletions", chat(logit_bias={"1536": 1}), "logit_bias", InvalidRequest),
    ("ChatCompletions", chat(logit_bias={"5": 1e300}), "logit_bias", InvalidRequest),
    ("ChatCompletions", chat(logprobs=True, top_logprobs=21), "top_logprobs", InvalidRequest),
    ("ChatCompletions", chat("word " * 3000), "messages", ContextExceeded),
    ("ChatCompletions", chat("x" * 300_000), "messages[0].content", ContextExceeded),
    ("ChatCompletions", chat("x" * 3_000_000), "request", RequestTooLarge),
    ("ChatCompletions", chat(messages=[{"role": "user", "content": ""}] * 2048), "messages", ContextExceeded),
    ("ChatCompletions", chat(tool_choice="required"), "tool_choice", InvalidRequest),
    ("ChatCompletions", chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", InvalidRequest),
    ("ChatCompletions", chat(reasoning_effort="low"), "reasoning_effort", InvalidRequest),
    ("ChatCompletions", chat(chat_template_kwargs={"mood": 1}), "chat_template_kwargs", InvalidRequest),
    ("ChatCompletions", chat(messages=[{"role": "user"}]), "messages[0].content", InvalidRequest),
    ("ChatCompletions", b"{", "body", InvalidRequest),
    ("Completions", completion(""), "prompt", InvalidRequest),
    ("Completions", completion([]), "prompt", InvalidRequest),
    ("Completions", completion([[]]), "prompt", InvalidRequest),
    ("Completions", completion([1536]), "prompt", InvalidRequest),
    ("Completions", completion([[5], [-1]]), "prompt", InvalidRequest),
    ("Completions", completion([[5]] * 129), "prompt", InvalidRequest),
    ("Completions", completion([5] * 2048), "prompt", ContextExceeded),
    ("Completions", completion(logprobs=21), "logprobs", InvalidRequest),
    ("Completions", completion(suffix="x"), "suffix", InvalidRequest),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("call", "body", "param", "kind"), BAD, ids=[f"{i}-{bad[2]}" for i, bad in enumerate(BAD)])
async def test_bad_input_is_a_status_that_names_the_parameter(
    simulated: LocalCluster, call: str, body: Any, param: str, kind: type[TandemError], stream: bool
) -> None:
    sent = body if isinstance(body, bytes) else {**body, "stream": stream}
    with pytest.raises(TandemError) as refused:
        await ask(simulated.frontend.address, call, sent)
    assert type(refused.value) is kind
    assert refused.value.metadata["field"] == param
    assert refused.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize(("stream", "param"), [(False, "stop"), (True, "stream")])
async def test_log_probabilities_of_a_prompt_are_neither_cut_nor_streamed(
    simulated: LocalCluster, stream: bool, param: str
) -> None:
    sent = completion(echo=True, logprobs=1, stop="x", stream=stream)
    with pytest.raises(InvalidRequest) as refused:
        await ask(simulated.frontend.address, "Completions", sent)
    assert refused.value.metadata["field"] == param


async def test_another_model_is_not_found(simulated: LocalCluster) -> None:
    with pytest.raises(ModelNotFound):
        await ask(simulated.frontend.address, "ChatCompletions", chat(model="gpt"))


async def test_models_and_what_is_not_served(simulated: LocalCluster) -> None:
    async with open_channel(simulated.frontend.address) as channel:
        stub: Any = OpenAiServiceStub(channel)
        listed = json.loads((await stub.ListModels(pb.OpenAiServiceListModelsRequest(), timeout=5)).data)
        one = json.loads((await stub.GetModel(pb.OpenAiServiceGetModelRequest(id=MODEL), timeout=5)).data)
        assert listed == {"object": "list", "data": [one]}
        context = {"max_model_len": 2048, "context_length": 2048}
        assert one == {"id": MODEL, "object": "model", "created": one["created"], "owned_by": "tandem", **context}
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModel(pb.OpenAiServiceGetModelRequest(id="gpt"), timeout=5)
        assert isinstance(from_rpc_error(refused.value), ModelNotFound)
        body = json.dumps({"model": MODEL, "input": "a"}).encode()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Embeddings(httpbody_pb2.HttpBody(data=body), timeout=5)
        assert isinstance(from_rpc_error(refused.value), NotSupported)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_ends_every_choice(simulated: LocalCluster, n: int) -> None:
    body = json.dumps(chat(max_tokens=2000, stream=True, n=n)).encode()
    async with open_channel(simulated.frontend.address) as channel:
        stub: Any = OpenAiServiceStub(channel)
        call = stub.ChatCompletions(httpbody_pb2.HttpBody(data=body))
        for _ in range(10):
            await call.read()
        call.cancel()
    await assert_eventually(lambda: idle(simulated), bool, within_s=1.0, every_s=0.02, what="both engines idle")


@pytest.mark.parametrize("n", [1, 2])
async def test_a_failure_after_the_first_byte_is_the_last_event(tmp_path: Path, n: int) -> None:
    async with running(tmp_path, engine="simulated", worker_flags=SIMULATED) as cluster:
        asking = asyncio.create_task(
            ask(cluster.frontend.address, "ChatCompletions", chat(max_tokens=2000, stream=True, n=n))
        )
        await assert_eventually(lambda: idle(cluster), lambda is_idle: not is_idle, within_s=5, what="a running stream")
        await asyncio.sleep(0.3)
        cluster.process("decode-0").signal(signal.SIGKILL)
        *events, last = (await asking).raw_events
    assert len(events) > n
    error = json.loads(last)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["type"], error["param"], error["code"]) == ("service_unavailable_error", None, "leg_failed")
    assert "decode-0" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        completion(["x"] * 65, n=2),
        completion(["x"] * 129),
        completion([[5]] * 128, n=128, stop=["a"]),
    ],
)
async def test_more_choices_than_can_be_taken_are_refused_before_any_is_made(
    simulated: LocalCluster, body: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await ask(simulated.frontend.address, "Completions", body)
    assert refused.value.field in {"n", "prompt"}


@pytest.mark.parametrize(
    "bomb",
    [
        {"stop": ["a"] * 10_000},
        {"stop_token_ids": [5] * 10_000},
        {"logit_bias": {str(number): 1 for number in range(1_100)}},
        {"regex": "a" * 20_000},
        {"cache_salt": "s" * 200},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": "b" * 70_000}}}},
    ],
)
async def test_what_each_choice_would_be_given_is_bounded(simulated: LocalCluster, bomb: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await ask(simulated.frontend.address, "Completions", completion([[5]] * 64, n=2, max_tokens=1, **bomb))
    assert refused.value.field == next(iter(bomb))


async def test_a_models_name_may_be_percent_encoded(simulated: LocalCluster) -> None:
    async with open_channel(simulated.frontend.address) as channel:
        stub: Any = OpenAiServiceStub(channel)
        one = await stub.GetModel(pb.OpenAiServiceGetModelRequest(id="tandem%2Ddemo"), timeout=5)
        assert json.loads(one.data)["id"] == MODEL
