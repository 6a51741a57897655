"""Conversion of SGLang's load snapshots: a value is reported only if every rank reports it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tandem.domain.worker import EngineLoad, WorkerRole
from tandem.engine.sglang import capabilities

QUEUES = SimpleNamespace(waiting=1, grammar=0, retracted=0)
HAND_OVERS = SimpleNamespace(
    prefill_bootstrap_queue_reqs=0,
    prefill_inflight_queue_reqs=0,
    decode_prealloc_queue_reqs=2,
    decode_transfer_queue_reqs=3,
)


def snapshot(**changes: Any) -> SimpleNamespace:
    values = {
        "timestamp": 1.0,
        "num_running_reqs": 4,
        "num_waiting_uncached_tokens": 5,
        "num_used_tokens": 60,
        "max_total_num_tokens": 100,
        "kv_transferring_tokens": 20,
        "kv_cached_tokens": 30,
        "kv_free_tokens": 10,
        "queues": QUEUES,
        "disaggregation": HAND_OVERS,
    }
    return SimpleNamespace(**values | changes)


def test_every_rank_is_added_up() -> None:
    load = capabilities.load([snapshot(), snapshot()], WorkerRole.DECODE)
    assert (load.running_requests, load.waiting_requests, load.waiting_tokens, load.transferring_requests) == (
        8,
        2,
        10,
        10,
    )
    assert (load.kv_used_tokens, load.kv_capacity_tokens) == (120, 200)
    assert (load.kv_transferring_tokens, load.kv_cached_tokens, load.kv_free_tokens) == (40, 60, 20)


def test_a_value_that_one_rank_does_not_report_is_none() -> None:
    load = capabilities.load([snapshot(), snapshot(kv_transferring_tokens=None)], WorkerRole.PREFILL)
    assert load.kv_transferring_tokens is None
    assert load.kv_free_tokens == 20


def test_no_load_is_known_before_the_first_snapshot() -> None:
    assert capabilities.load([snapshot(timestamp=0.0)], WorkerRole.DECODE) == EngineLoad()
