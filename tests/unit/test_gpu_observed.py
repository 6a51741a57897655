"""Checks of the GPU run on a cluster's observability: order of steps, sums of pages, kernels in a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tandem.api.types.v1 import leg_pb2
from tandem.engine.sglang.hooks.kv_accounting import TransferStats
from tools.gpu import observed


def test_offsets_cover_the_reported_steps() -> None:
    timings = leg_pb2.LegTimings()
    timings.queued_time.FromNanoseconds(2_500_000)
    timings.kv_transfer_end_time.FromNanoseconds(9_000_000)
    assert observed.offsets_ms(timings, 2_000_000) == {"queued": 0.5, "kv_transfer_end": 7.0}


def test_steps_that_are_missing_or_swapped_are_named() -> None:
    order = ("queued", "kv_transfer_end", "first_token")
    assert observed.out_of_order({"queued": 1.0, "kv_transfer_end": 1.0, "first_token": 3.0}, order, "decode") == []
    wrong = observed.out_of_order({"queued": 4.0, "first_token": 3.0}, order, "decode")
    assert wrong == ["decode: no kv_transfer_end", "decode: queued after first_token"]


def test_tokens_that_are_nowhere_are_missing() -> None:
    load = {"kv_capacity_tokens": 100, "kv_used_tokens": 20, "kv_cached_tokens": 30}
    assert observed.missing_tokens(load) == 50
    assert observed.missing_tokens({**load, "kv_free_tokens": 50}) == 0


def test_kernels_of_a_trace_are_counted(tmp_path: Path) -> None:
    events = [{"cat": "kernel", "name": "gemm"}, {"cat": "kernel", "name": "gemm"}, {"cat": "cpu_op", "name": "add"}]
    (tmp_path / "a.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    (found,) = observed.all_traced(tmp_path).values()
    assert found["kernels"] == {"gemm": 2}
    assert found["kinds"] == {"kernel": 2, "cpu_op": 1}


def test_received_bytes_do_not_imply_a_start_time() -> None:
    transfers = TransferStats()
    transfers.moved(7, 100, 5.0)
    transfer, _ = transfers.close(7, "r")
    assert (transfer.start_s, transfer.end_s, transfer.moved_bytes) == (None, 5.0, 100)
