"""The proof that it is real: SGLang engines in their own processes, KV over NIXL, the whole way through the frontend.

Greedy tokens of a pair equal those of one aggregated engine and, in float32, those of transformers on the same weights;
they do so because KV moved (bytes counted, nothing recomputed), and no longer do when it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import error_pb2, generation_pb2, leg_pb2, sampling_pb2, worker_pb2
from tandem.client import admin_calls, calls
from tandem.errors import EngineFailed, InvalidRequest, LegFailed
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.direct_legs import direct_legs
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL, running
from tests.integration.support import kv_faults
from tests.integration.support.calls import Stream, generate, refusal, request_of
from tests.integration.support.scheduler_faults import FAULT_TOKENS, SENTENCE, plug_in
from tools.demo_model import facts

pytestmark = [
    pytest.mark.engine_sglang,
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt"),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(240),
]

LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 64, 65, 100, 127, 128, 129, 200, 256, 300, 400, 500, 511, 600)
NEW_TOKENS = 16
CONCURRENT = 8
FIRST_ORDINARY_TOKEN = 6
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
WEIGHTS = DEMO_MODEL / "model.safetensors"
FLOAT32 = {"dtype": "float32"}
KV_BYTES_PER_TOKEN = 4 * 2 * 2 * 64 * 4
"""Layers, keys and values, KV heads, head size, bytes: of the demo model in float32."""


def prompt_of(length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(FIRST_ORDINARY_TOKEN, 1536) for _ in range(length)]


def parity_request(length: int) -> pb.GenerateRequest:
    return request_of(token_ids=prompt_of(length), max_tokens=NEW_TOKENS, ignore_eos=True)


async def parity_streams(cluster: LocalCluster, concurrent: int) -> dict[int, Stream]:
    """The stream of each prompt, so many at a time."""
    gate = asyncio.Semaphore(concurrent)

    async def one(length: int) -> Stream:
        async with gate:
            return await generate(cluster, parity_request(length))

    streams = await asyncio.gather(*(one(length) for length in LENGTHS))
    return dict(zip(LENGTHS, streams, strict=True))


def tokens(streams: dict[int, Stream]) -> dict[int, list[int]]:
    return {length: stream.token_ids for length, stream in streams.items()}


@pytest.fixture(scope="module")
def transformers_tokens() -> dict[int, list[int]]:
    """Greedy tokens of transformers, in float32, one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    found = {}
    for length in LENGTHS:
        prompt = torch.tensor([prompt_of(length)])
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
        found[length] = out[0, length:].tolist()
    return found


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def aggregated_tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Greedy tokens of one aggregated worker, one prompt at a time."""
    logs = tmp_path_factory.mktemp("aggregated")
    async with running(logs, prefill=0, decode=0, aggregated=1, worker_flags=FLOAT32) as cluster:
        streams = await parity_streams(cluster, 1)
    assert not any(stream.finish.timings.HasField("kv_transfer_bytes") for stream in streams.values())
    return tokens(streams)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(
    aggregated_tokens: dict[int, list[int]],
    transformers_tokens: dict[int, list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[LocalCluster]:
    """A prefill and a decode worker; started after the aggregated one has gone, for two cores hold no more."""
    logs = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as environment:
        plugin = kv_faults.plug_in(logs)
        environment.setenv(kv_faults.FIRED, plugin.pop(kv_faults.FIRED))
        path = [*plugin.values(), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment.setenv("PYTHONPATH", os.pathsep.join(path))
        async with running(logs, worker_flags=FLOAT32) as cluster:
            yield cluster


async def test_the_pair_equals_one_engine_and_transformers(
    pair: LocalCluster, aggregated_tokens: dict[int, list[int]], transformers_tokens: dict[int, list[int]]
) -> None:
    streams = await parity_streams(pair, CONCURRENT)
    assert tokens(streams) == aggregated_tokens
    assert tokens(streams) == transformers_tokens
    for length, stream in streams.items():
        timings = stream.finish.timings
        assert timings.kv_transfer_bytes >= length * KV_BYTES_PER_TOKEN
        assert timings.HasField("recomputed_tokens")
        assert timings.recomputed_tokens == 0
        assert timings.kv_check == generation_pb2.KV_CHECK_MATCHED
        times = [timings.accepted_time, timings.prefill_start_time, timings.prefill_end_time, timings.first_token_time]
        assert [t.ToNanoseconds() for t in times] == sorted(t.ToNanoseconds() for t in times)


async def test_the_demo_model_recalls_the_prompt_and_stops(pair: LocalCluster) -> None:
    story = (
        "Listen carefully. Mia hid the red key in the old barn. Theo left the orange spoon in the dark forest. "
        "Sam put the blue ball near the warm window. It was a sunny day. Where did Mia hide the red key?"
    )
    stream = await generate(pair, request_of(chat=story, max_tokens=60))
    assert stream.text.strip() == "Mia hid the red key in the old barn."
    assert stream.finish.reason == generation_pb2.FINISH_REASON_STOP
    assert stream.finish.matched_stop.token_id == TOKENIZER.token_to_id("<|end|>")
    assert stream.finish.timings.recomputed_tokens == 0


async def test_damaged_kv_is_found_and_handed_over_again(pair: LocalCluster) -> None:
    """Each kind of damage twice. There is one pair, so it repeats the request itself."""
    requests = [
        request_of(token_ids=[*kv_faults.mark(kind), *prompt_of(70 + n)], max_tokens=NEW_TOKENS, ignore_eos=True)
        for n, kind in enumerate(kv_faults.KINDS * 2)
    ]
    damaged = await asyncio.gather(*(generate(pair, request) for request in requests))
    assert kv_faults.fired(pair.log_directory) == sorted(kv_faults.KINDS * 2)
    for stream in damaged:
        (timeline,) = await admin_calls.request_timelines(pair.frontend.address, stream.accepted.request_id)
        failed = [attempt.failure.reason for attempt in timeline.attempts]
        assert failed == [error_pb2.ERROR_REASON_KV_CORRUPT, error_pb2.ERROR_REASON_UNSPECIFIED]
        assert stream.finish.timings.kv_check == generation_pb2.KV_CHECK_MATCHED
    # Nothing damages them any more.
    undisturbed = [await generate(pair, request) for request in requests]
    assert [stream.token_ids for stream in damaged] == [stream.token_ids for stream in undisturbed]


async def test_a_prefix_that_prefill_has_seen_is_cached(pair: LocalCluster) -> None:
    request = request_of(token_ids=prompt_of(333), max_tokens=4, ignore_eos=True)
    first, second = await generate(pair, request), await generate(pair, request)
    assert second.token_ids == first.token_ids
    assert first.finish.usage.cached_tokens == 0
    assert second.finish.usage.cached_tokens > 300
    assert second.finish.timings.kv_transfer_bytes >= 333 * KV_BYTES_PER_TOKEN


async def test_logprobs_come_from_the_model(pair: LocalCluster) -> None:
    request = parity_request(17)
    request.logprobs.top_logprobs = 3
    stream = await generate(pair, request)
    logprobs = [logprob for chunk in stream.chunks for logprob in chunk.logprobs]
    assert [logprob.token_id for logprob in logprobs] == stream.token_ids
    # Greedy: the token chosen is the likeliest one.
    assert all(logprob.top[0].token_id == logprob.token_id for logprob in logprobs)
    assert all(logprob.top[0].logprob == pytest.approx(logprob.logprob, abs=1e-5) for logprob in logprobs)


async def test_the_engine_follows_a_regular_expression(pair: LocalCluster) -> None:
    request = request_of("Once upon a time", max_tokens=12)
    request.guided.regex = "(red|blue) (key|door)"
    assert (await generate(pair, request)).text in {"red key", "red door", "blue key", "blue door"}


async def test_a_grammar_that_does_not_compile_is_named(pair: LocalCluster) -> None:
    request = request_of("Once upon a time", max_tokens=12)
    request.guided.regex = "(red"
    problem = await refusal(pair, request)
    assert isinstance(problem, InvalidRequest), problem
    assert problem.metadata["field"].startswith("guided")
    assert (await generate(pair, parity_request(5))).token_ids


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("regex", r"[^\s\S]"),
        ("regex", r"a[^\s\S]"),
        ("ebnf", 'root ::= root "a"'),
        ("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}'),
        ("json_schema", '{"items":' * 900 + "{}" + "}" * 900),
    ],
    ids=["never", "dead end", "left recursion", "endless reference", "deep"],
)
async def test_a_grammar_that_cannot_be_followed_is_named(pair: LocalCluster, kind: str, grammar: str) -> None:
    request = request_of("Once upon a time", max_tokens=12)
    setattr(request.guided, kind, grammar)
    begin_s = time.monotonic()
    problem = await refusal(pair, request)
    assert isinstance(problem, InvalidRequest), problem
    assert problem.metadata["field"] == f"guided.{kind}"
    assert time.monotonic() - begin_s < 8
    assert (await generate(pair, parity_request(5))).token_ids


async def test_a_seed_repeats_a_draw(pair: LocalCluster) -> None:
    def drawn(**sampling: Any) -> pb.GenerateRequest:
        request = request_of("Once upon a time", max_tokens=24, ignore_eos=True)
        request.sampling.MergeFrom(sampling_pb2.Sampling(temperature=1.0, **sampling))
        return request

    async def texts(*requests: pb.GenerateRequest) -> list[str]:
        return [stream.text for stream in await asyncio.gather(*(generate(pair, r) for r in requests))]

    filters = {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    first = await texts(drawn(seed=1), drawn(), drawn(seed=2), drawn(seed=1, **filters), drawn())
    second = await texts(drawn(), drawn(seed=1, **filters), drawn(seed=2), drawn(seed=1), drawn())
    assert (first[0], first[2], first[3]) == (second[3], second[2], second[1])
    assert len({first[0], first[2], first[1], first[4], second[0], second[4]}) == 6


async def test_the_last_places_of_the_context_can_be_used(pair: LocalCluster) -> None:
    for left in (1, 2, 5):
        stream = await generate(pair, request_of(token_ids=prompt_of(2048 - left), max_tokens=50, ignore_eos=True))
        assert len(stream.token_ids) == left
        assert stream.finish.reason == generation_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("stop_by", ["token", "string"])
async def test_stops(pair: LocalCluster, stop_by: str) -> None:
    whole = await generate(pair, request_of("Once upon a time", max_tokens=24))
    if stop_by == "token":
        stop = whole.token_ids[9]
        stream = await generate(pair, request_of("Once upon a time", max_tokens=24, stop_token_ids=[stop]))
        assert stream.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert stream.finish.matched_stop.token_id == stop
    else:
        word = whole.text[12:18]
        stream = await generate(pair, request_of("Once upon a time", max_tokens=24, stop=[word]))
        assert stream.text == whole.text[: whole.text.index(word)]
        assert stream.finish.matched_stop.stop == word
    assert stream.finish.reason == generation_pb2.FINISH_REASON_STOP
    assert stream.finish.timings.kv_transfer_bytes > 0


async def idle(cluster: LocalCluster) -> bool:
    loads = [await calls.worker_load(worker.address) for worker in cluster.workers]
    return not any(
        load.open_legs or load.running_requests or load.waiting_requests or load.transferring_requests for load in loads
    )


async def test_a_client_that_leaves_ends_both_engines_work(pair: LocalCluster) -> None:
    await assert_eventually(lambda: idle(pair), bool, within_s=5, what="idle engines at the start")
    request = request_of(token_ids=prompt_of(64), max_tokens=1900, ignore_eos=True)
    async with contextlib.aclosing(calls.generate(pair.frontend.address, request)) as events:
        async for event in events:
            if event.HasField("chunk"):
                break
    # 1,900 tokens would take seconds.
    await assert_eventually(lambda: idle(pair), bool, within_s=1.0, every_s=0.02, what="both engines idle")
    assert (await generate(pair, parity_request(5))).token_ids


async def test_odd_text_survives_the_way(pair: LocalCluster) -> None:
    request = request_of("Ünïcödé 東京 👩‍👩‍👧 \x00 \u202e", max_tokens=8)
    stream = await generate(pair, request)
    stream.text.encode()
    assert len(stream.token_ids) <= 8


RECALL_PROMPTS = 40


def recall_prompts() -> list[facts.RecallPrompt]:
    """Unseen stories with a question about a detail, 100 to 300 tokens behind it."""
    return list(facts.recall_prompts(7, RECALL_PROMPTS, 100, 300, lambda text: len(TOKENIZER.encode(text).ids)))


async def test_recall_through_the_pair(pair: LocalCluster) -> None:
    prompts = recall_prompts()
    requests = [request_of(chat=prompt.messages[0]["content"], max_tokens=40) for prompt in prompts]
    streams = [await generate(pair, request) for request in requests]
    right = [stream.text.strip() == prompt.answer for stream, prompt in zip(streams, prompts, strict=True)]
    assert sum(right) / RECALL_PROMPTS >= 0.9
    assert all(stream.finish.timings.recomputed_tokens == 0 for stream in streams)


async def sabotaged_tokens(worker: worker_pb2.Worker, token_ids: list[int], number: int, max_tokens: int) -> list[int]:
    """What a decode worker emits for a prompt whose KV never comes; SGLang pretends to meet this host of its own."""
    leg = leg_pb2.LegRequest(
        request_id=f"sabotaged-{number}",
        attempt=1,
        worker_epoch=worker.epoch,
        model=worker.capabilities.model,
        token_ids=token_ids,
        sampling={"temperature": 0.0},  # type: ignore[arg-type]
        stopping={"max_tokens": max_tokens},  # type: ignore[arg-type]
        bootstrap=leg_pb2.Bootstrap(host="2.2.2.2", port=1, room=number),
    )
    async with direct_legs(worker.address) as legs:
        sabotaged = await legs.start(leg)
        finish = await asyncio.wait_for(sabotaged.finish(), 30)
    assert not finish.timings.kv_transfer_bytes
    return sabotaged.token_ids


# The tests from here on end engines of the pair.


async def test_a_killed_engine_is_one_typed_error_in_seconds(pair: LocalCluster) -> None:
    request = request_of(token_ids=prompt_of(64), max_tokens=1900, ignore_eos=True)
    decode = pair.process("decode-0")

    async def until_killed() -> None:
        async for event in calls.generate(pair.frontend.address, request):
            if event.HasField("chunk") and event.chunk.index == 2:
                decode.signal(signal.SIGKILL)

    begin_s = time.monotonic()
    with pytest.raises(LegFailed) as failed:
        await until_killed()
    assert time.monotonic() - begin_s < 4
    assert failed.value.metadata["leg"] == "decode"
    assert failed.value.metadata["worker"] == "decode-0"
    assert failed.value.metadata["phase"] == "decoding"


async def test_without_transfer_parity_and_recall_collapse(
    pair: LocalCluster, aggregated_tokens: dict[int, list[int]], tmp_path: Path
) -> None:
    await pair.stop()
    flags = {"decode": {"transfer-backend": "fake"}}
    async with running(tmp_path, prefill=0, worker_flags=FLOAT32, role_flags=flags) as cluster:
        (listed,) = await calls.list_workers(cluster.registry.address)
        wrong = [
            length
            for length in LENGTHS
            if await sabotaged_tokens(listed.worker, prompt_of(length), length, NEW_TOKENS) != aggregated_tokens[length]
        ]
        assert wrong == list(LENGTHS)
        right = 0
        for number, prompt in enumerate(recall_prompts(), start=1000):
            rendered = f"<|bos|><|user|>{prompt.messages[0]['content']}<|end|><|assistant|>"
            ids = TOKENIZER.encode(rendered, add_special_tokens=False).ids
            got = await sabotaged_tokens(listed.worker, ids, number, 40)
            right += TOKENIZER.decode(got).strip() == prompt.answer
        assert right == 0


async def test_a_prefill_scheduler_that_raises_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would keep the process alive: the worker would stay in the registry, and every request hang."""
    path = [str(plug_in(tmp_path)), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    async with running(tmp_path, decode=0, frontends=0) as cluster:
        prefill = cluster.process("prefill-0")
        (listed,) = await calls.list_workers(cluster.registry.address)
        leg = leg_pb2.LegRequest(
            request_id="faulty",
            attempt=1,
            worker_epoch=listed.worker.epoch,
            model=listed.worker.capabilities.model,
            token_ids=FAULT_TOKENS,
            stopping={"max_tokens": 1},  # type: ignore[arg-type]
            bootstrap=leg_pb2.Bootstrap(host="127.0.0.1", port=1, room=1),
        )
        async with direct_legs(prefill.address) as legs:
            faulty = await legs.start(leg)
            with pytest.raises(EngineFailed, match=SENTENCE):
                await asyncio.wait_for(faulty.finish(), 30)
        async with asyncio.timeout(10):
            assert await prefill.wait_ended() == 1
        assert SENTENCE in (prefill.last_words() or "")
        assert not await calls.list_workers(cluster.registry.address)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
        (
            lambda model: (model / "model.safetensors").write_bytes(
                (DEMO_MODEL / "model.safetensors").read_bytes()[:-9]
            ),
            "model.safetensors is truncated or damaged",
        ),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
    ],
    ids=["empty weights", "truncated weights", "no tokenizer", "empty tokenizer", "no config"],
)
async def test_a_damaged_model_is_one_sentence(tmp_path: Path, damage: Any, sentence: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in DEMO_MODEL.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    damage(model)
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tandem_decode",
        "--registry=127.0.0.1:1",
        f"--model={model}",
        "--role=aggregated",
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await worker.communicate()
    last = stderr.decode().strip().splitlines()[-1]
    assert worker.returncode == 1
    assert sentence in last
    assert "Traceback" not in stderr.decode()
    assert json.dumps(str(model / sentence.split()[0]))[1:-1] in last
