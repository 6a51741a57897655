"""Unequal tensor parallelism: which engines say that they take it, which pairs may form, and what the hook prepares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.domain.checkpoint import Checkpoint, read_checkpoint
from tandem.domain.worker import WorkerRole, capabilities_digest, incompatible_field, written_fields
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang.capabilities import takes_unequal_tp
from tandem.engine.sglang.hooks import unequal_tp
from tandem.testing.fake_model import write_fake_model
from tests.unit.support.frontend_workers import CAPABILITIES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of two KV heads."""
    return read_checkpoint(write_fake_model(tmp_path_factory.mktemp("model")))


def server(**changes: Any) -> Any:
    return SimpleNamespace(**{"device": "cpu", "tp_size": 2, "pp_size": 1, "dp_size": 1, **changes})


def settings(**changes: Any) -> EngineSettings:
    return EngineSettings(**{"role": WorkerRole.PREFILL, "model_path": Path("m"), "model_name": "m", **changes})


@pytest.mark.parametrize(
    ("own", "args", "expected"),
    [
        ({}, {}, True),
        ({"role": WorkerRole.DECODE}, {"tp_size": 1}, True),
        ({"role": WorkerRole.AGGREGATED}, {}, False),
        ({"transfer_backend": "fake"}, {}, False),
        ({"unequal_tp": False}, {}, False),
        ({}, {"device": "cuda"}, False),
        ({"unequal_tp": True}, {"device": "cuda"}, True),
        ({}, {"tp_size": 4}, False),
        ({}, {"pp_size": 2}, False),
        ({}, {"dp_size": 2}, False),
    ],
)
def test_engine_says_that_it_takes_unequal_tp_only_where_that_was_tried(
    checkpoint: Checkpoint, own: dict[str, Any], args: dict[str, Any], expected: bool
) -> None:
    assert takes_unequal_tp(settings(**own), checkpoint, server(**args)) is expected


@pytest.mark.parametrize(
    ("config", "tp_size", "expected"),
    [
        ({"num_key_value_heads": 4}, 2, True),
        ({"num_key_value_heads": 3}, 2, False),
        ({"num_key_value_heads": 4}, 4, False),
        ({"layer_types": ["full_attention"] * 2}, 2, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 2, False),
    ],
)
def test_unequal_tp_needs_whole_heads_a_size_that_was_tried_and_full_attention(
    checkpoint: Checkpoint, config: dict[str, Any], tp_size: int, expected: bool
) -> None:
    model = replace(checkpoint, config=checkpoint.config | config)
    assert takes_unequal_tp(settings(unequal_tp=True), model, server(tp_size=tp_size)) is expected


def test_pair_of_unequal_tp_is_refused_by_field_unless_both_take_it() -> None:
    one, two = (replace(CAPABILITIES, unequal_tp=True, tensor_parallel_size=size) for size in (1, 2))
    assert incompatible_field(one, two) is None
    assert incompatible_field(two, one) is None
    for prefill, decode in ((one, replace(two, unequal_tp=False)), (replace(one, unequal_tp=False), two)):
        assert incompatible_field(prefill, decode) == "tensor_parallel_size"
    assert incompatible_field(one, replace(one, unequal_tp=False)) is None, "equal sizes need nothing"


def test_unequal_tp_is_stored_where_it_is_set_and_never_in_the_digest() -> None:
    takes_it = replace(CAPABILITIES, unequal_tp=True)
    assert capabilities_digest(takes_it) == capabilities_digest(CAPABILITIES)
    assert "unequal_tp" in written_fields(takes_it)
    assert "unequal_tp" not in written_fields(CAPABILITIES)


class Manager:
    """The part of SGLang's NIXL manager that the hook uses."""

    is_mla_backend = is_hybrid_mla_backend = False
    attn_tp_size = 2
    kv_args = SimpleNamespace(kv_item_lens=[64])

    def __init__(self) -> None:
        self.prepared: list[tuple[str, str, str]] = []
        self.originals = 0

    def _init_hetero_tp_prep_handle(self, name: str, peer: Any, src_mem_kind: str, dst_mem_kind: str) -> None:
        self.prepared.append((name, src_mem_kind, dst_mem_kind))

    def original(self, manager: Any, peer: Any) -> str:
        self.originals += 1
        return "prepared by SGLang"


def peer(**changes: Any) -> Any:
    return SimpleNamespace(**{"agent_name": "d0", "decode_tp_size": 1, "requires_dcp_relayout": False, **changes})


def test_hook_prepares_lists_of_host_memory_for_each_peer_of_another_size() -> None:
    manager, first, second = Manager(), peer(), peer(agent_name="d1")
    for each in (first, second):
        unequal_tp.prepare(manager.original, manager, each)
        assert each.dst_homogeneous_mem_kind == "DRAM"
    assert manager.prepared == [("d0", "DRAM", "DRAM"), ("d1", "DRAM", "DRAM")]
    assert manager.originals == 0


@pytest.mark.parametrize(
    ("changes", "about"),
    [({}, {"decode_tp_size": 2}), ({}, {"requires_dcp_relayout": True}), ({"is_mla_backend": True}, {})],
)
def test_hook_leaves_every_other_peer_to_sglang(changes: dict[str, Any], about: dict[str, Any]) -> None:
    manager = Manager()
    for name, value in changes.items():
        setattr(manager, name, value)
    assert unequal_tp.prepare(manager.original, manager, peer(**about)) == "prepared by SGLang"
    assert (manager.originals, manager.prepared) == (1, [])


def test_ranks_of_decode_that_a_rank_of_prefill_writes_to_are_counted_without_dummies() -> None:
    ranks = {f"d{number}": SimpleNamespace(is_dummy=number == 2) for number in range(3)}
    manager = SimpleNamespace(transfer_infos={5: ranks})
    assert (unequal_tp.fed_ranks(manager, 5), unequal_tp.fed_ranks(manager, 6)) == (2, 1)
