"""What keeps generations and embeddings apart, and an embedding that is none from a client."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.embedding import NoTokens
from tandem_frontend.openai.body_check.limits import check_values
from tandem_frontend.openai.embeddings import _whole
from tandem_frontend.preparation.embedding_inputs import input_id
from tandem_frontend.routing.pools import Pools
from tandem_registry.backends.consul.records import Record, meta
from tandem_registry.validation import checked_worker

from tandem import config as configuration
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2, worker_pb2
from tandem.cli import model_status
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.worker import EMBED, Capabilities, WorkerRole, capabilities_digest, written_fields
from tandem.engine.simulated.embeddings import embedding_of
from tandem.errors import ConfigError, InvalidRequest, LegFailed, NotSupported
from tandem.rpc.convert import worker_from_proto, worker_to_proto
from tandem.testing.fake_model import write_fake_model
from tandem.worker.config import WorkerConfig
from tandem.worker.leg_messages import check_task
from tests.unit.support.frontend_workers import CAPABILITIES, aggregated
from tests.unit.support.scripted_legs import ScriptedLeg, Word, accepted
from tests.unit.test_frontend_attempts import Scene

ABOUT = {"task": EMBED, "embedding_size": 3, "embedding_sizes": (2,), "is_matryoshka": True}
EMBEDS: Capabilities = replace(CAPABILITIES, **ABOUT)  # type: ignore[arg-type]
VECTOR = (0.0, 0.5, -0.5)


def embedder(worker_id: str) -> Any:
    return replace(aggregated(worker_id), capabilities=EMBEDS)


def ends_with(*values: float, is_aborted: bool = False) -> Word:
    reason = generation_pb2.FINISH_REASON_ABORTED if is_aborted else generation_pb2.FINISH_REASON_STOP
    return lambda sink: sink.finish(leg_pb2.LegFinish(reason=reason, embedding=values))


async def embedded(*ends: Word, dimensions: int | None = None) -> tuple[list[float], list[str]]:
    """The embedding of a request whose attempts end so, in this order, and the workers that it was sent to."""
    scene, sent = Scene(*(embedder(f"e{number}") for number in range(len(ends)))), list[str]()

    def leg(worker_id: str, sink: Any) -> ScriptedLeg:
        sent.append(worker_id)
        return ScriptedLeg(accepted, ends[len(sent) - 1]).play(sink)

    scene.dispatch.leg = leg  # type: ignore[method-assign]
    request = leg_pb2.LegRequest(request_id="r", embedding={"dimensions": dimensions}, stopping={"max_tokens": 1})  # type: ignore[arg-type]
    async with scene.attempts.accepted(request, NoTokens(), None) as stream:
        await stream.run()
        finish = stream.finish()
    assert finish is not None
    return list(finish.embedding), sent


@pytest.mark.parametrize("broken", [(0.5,), (), (0.5, math.nan, 0.0), (math.inf, 0.0, 0.0), (0.0,) * 4])
async def test_attempt_embedding_that_is_none_is_computed_on_another_worker(broken: tuple[float, ...]) -> None:
    values, sent = await embedded(ends_with(*broken), ends_with(*VECTOR))
    assert values == list(VECTOR)
    assert sorted(sent) == ["e0", "e1"]


async def test_attempt_embedding_that_no_worker_can_compute_fails_and_names_the_size() -> None:
    with pytest.raises(LegFailed, match="embedding of 1 numbers, not 3"):
        await embedded(ends_with(0.5), ends_with(0.5))


async def test_attempt_shortened_embedding_has_the_size_that_was_asked_for() -> None:
    values, _ = await embedded(ends_with(0.6, 0.8), dimensions=2)
    assert values == pytest.approx([0.6, 0.8])
    with pytest.raises(LegFailed, match="not 2"):
        await embedded(ends_with(*VECTOR), dimensions=2)


async def test_attempt_aborted_embedding_is_not_tried_again() -> None:
    assert await embedded(ends_with(is_aborted=True)) == ([], ["e0"])


async def test_attempt_embedding_counts_as_success_for_its_circuit_breaker() -> None:
    scene, noted = Scene(embedder("e0")), list[str]()
    scene.dispatch.leg = lambda worker_id, sink: ScriptedLeg(accepted, ends_with(*VECTOR)).play(sink)  # type: ignore[method-assign, arg-type]
    scene.breakers.succeeded = lambda worker, sent_s: noted.append(worker.worker_id)  # type: ignore[method-assign]
    request = leg_pb2.LegRequest(request_id="r", embedding={}, stopping={"max_tokens": 1})  # type: ignore[arg-type]
    async with scene.attempts.accepted(request, NoTokens(), None) as stream:
        await stream.run()
    assert noted == ["e0"]


def test_pools_workers_of_another_task_serve_only_where_none_generates() -> None:
    pools = Pools(CAPABILITIES.model, CAPABILITIES.tokenizer_digest)
    assert [pools.embeds] == [None]
    pools.follow((embedder("e"),))
    assert (pools.embeds, pools.selection(4).routes_count) == (True, 1)
    pools.follow((embedder("e"), aggregated("g")))
    assert (pools.embeds, [worker.worker_id for worker in pools.selection(4).streams]) == (False, ["g"])
    pools.follow((embedder("e"),))
    assert (pools.embeds, [worker.worker_id for worker in pools.selection(4).streams]) == (True, ["e"])
    pools.follow(())
    assert pools.embeds is True, "what it was, until a worker says otherwise"


def test_capabilities_of_a_generating_worker_have_the_digest_of_the_release_before() -> None:
    assert not {*ABOUT} & {*written_fields(CAPABILITIES)}
    assert {*ABOUT} < {*written_fields(EMBEDS)}
    assert capabilities_digest(EMBEDS) != capabilities_digest(replace(EMBEDS, task=""))
    assert not {*ABOUT} & meta(Record(member=aggregated("g"), owner="r")).keys()


def test_capabilities_of_an_embedding_worker_survive_protobuf() -> None:
    worker = embedder("e")
    assert worker_from_proto(worker_to_proto(worker)) == worker


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"task": "rerank"}, "worker.capabilities.task"),
        ({"embedding_size": 0}, "worker.capabilities.embedding_size"),
        ({"task": ""}, "worker.capabilities.embedding_size"),
    ],
)
def test_registry_worker_with_an_unknown_or_incomplete_task_is_refused_by_field(
    changes: dict[str, Any], field: str
) -> None:
    worker = replace(embedder("e"), epoch=1, address="127.0.0.1:1")
    checked_worker(worker_to_proto(worker))
    with pytest.raises(InvalidRequest) as refused:
        checked_worker(worker_to_proto(replace(worker, capabilities=replace(EMBEDS, **changes))))
    assert refused.value.field == field


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE])
def test_settings_task_embed_in_a_role_of_a_pair_is_refused(role: WorkerRole) -> None:
    flags = ["--registry=127.0.0.1:1", "--model=m", "--task=embed"]
    config = configuration.load(WorkerConfig, "tandem-worker", flags, {})
    with pytest.raises(ConfigError, match="embed needs the role aggregated") as refused:
        config.engine_settings(role)
    assert refused.value.key == "task"
    assert config.engine_settings(WorkerRole.AGGREGATED).task == EMBED
    assert config.allowed_roles(WorkerRole.AGGREGATED) == (WorkerRole.AGGREGATED,)


def test_worker_leg_of_the_other_task_is_refused_by_field() -> None:
    generation, embedding = leg_pb2.LegRequest(), leg_pb2.LegRequest(embedding={})  # type: ignore[arg-type]
    check_task(generation, aggregated("g"))
    check_task(embedding, embedder("e"))
    for leg, worker in ((generation, embedder("e")), (embedding, aggregated("g"))):
        with pytest.raises(NotSupported) as refused:
            check_task(leg, worker)
        assert refused.value.metadata["field"] == "model"


@pytest.mark.parametrize(
    ("config", "sizes", "is_matryoshka"),
    [
        ({}, (), False),
        ({"is_matryoshka": True}, (), True),
        ({"matryoshka_dimensions": [64, 8, 0, 128, "4", True]}, (8, 64), True),
        ({"matryoshka_dimensions": "all"}, (), False),
    ],
)
def test_checkpoint_sizes_of_embeddings_come_from_its_configuration(
    tmp_path: Path, config: dict[str, Any], sizes: tuple[int, ...], is_matryoshka: bool
) -> None:
    checkpoint = read_checkpoint(write_fake_model(tmp_path, **config))
    checkpoint.check_embeds()
    assert (checkpoint.embedding_size, checkpoint.embedding_sizes) == (64, sizes)
    assert checkpoint.is_matryoshka is is_matryoshka


@pytest.mark.parametrize("architecture", ["Qwen3ForSequenceClassification", "InternLM2ForRewardModel"])
def test_checkpoint_that_computes_scores_is_refused_as_an_embedder(tmp_path: Path, architecture: str) -> None:
    checkpoint = read_checkpoint(write_fake_model(tmp_path, architectures=[architecture]))
    with pytest.raises(ConfigError, match=f"{architecture} computes scores"):
        checkpoint.check_embeds()


def test_simulated_embedding_depends_on_tokens_and_weights_and_a_short_one_is_a_prefix() -> None:
    whole = embedding_of((1, 2, 3), 64, "a")
    assert math.isclose(math.fsum(value * value for value in whole), 1.0)
    assert embedding_of((1, 2, 3), 64, "a") == whole
    assert whole not in (embedding_of((1, 2, 4), 64, "a"), embedding_of((1, 2, 3), 64, "b"))
    short = embedding_of((1, 2, 3), 8, "a")
    assert [value / short[0] for value in short] == pytest.approx([value / whole[0] for value in whole[:8]])


async def test_openai_numbers_of_a_response_are_exact_float32() -> None:
    values = [1e-30, 1 / 3, -0.1, 1.0, 0.0]
    found = pb.EmbedResponse(model="m", embeddings=[pb.Embedding(values=values)])
    body = json.loads(await _whole(found, "float"))
    assert pb.Embedding(values=body["data"][0]["embedding"]) == found.embeddings[0]


def test_long_body_token_ids_of_input_count_apart_from_other_values() -> None:
    check_values({"input": [[1] * 30_000, [2] * 30_000]}, 65_536)
    with pytest.raises(InvalidRequest, match="70000 token ids") as refused:
        check_values({"input": [1] * 70_000}, 65_536)
    assert refused.value.field == "input"


def test_status_table_says_which_models_embed() -> None:
    models = [pb.Model(name="e", task=worker_pb2.MODEL_TASK_EMBED), pb.Model(name="g")]
    assert [row[-1] for row in model_status.rows({"frontend-0": models})] == ["serving, embeds", "serving"]


def test_input_labels_of_a_call_are_valid_and_differ() -> None:
    labels = {input_id("x" * 128, number) for number in range(2048)}
    assert len(labels) == 2048
    assert max(map(len, labels)) <= 128
