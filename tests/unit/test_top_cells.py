"""Cells of `tandem top`: the queue and the hit rate of a worker."""

from __future__ import annotations

from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.cli.top.cells import NAME_WIDTH_MIN, WORKER_COLUMNS, cell, fitting, shortened
from tandem.observability.fleet_sample import SERVING, UNREACHABLE, WorkerSample


def cells(load: worker_pb.WatchLoadResponse | None, state: str = SERVING) -> dict[str, str]:
    row = WorkerSample(name="p", role="prefill", epoch=1, address="a:1", state=state, health="ok", load=load)
    return {column.head: cell(column, row, 1.0) for column in WORKER_COLUMNS}


def test_hit_rate_and_queue_are_those_of_the_load_report() -> None:
    shown = cells(worker_pb.WatchLoadResponse(prompt_tokens=4_000, cached_tokens=1_000, waiting_tokens=12_345))
    assert (shown["HIT %"], shown["QUEUE"]) == ("25", "12.3k")


def test_unknown_hit_rate_and_queue_are_no_zero() -> None:
    assert cells(worker_pb.WatchLoadResponse(prompt_tokens=4_000))["HIT %"] == "?"
    assert cells(worker_pb.WatchLoadResponse(cached_tokens=0, prompt_tokens=0))["HIT %"] == "?"
    assert cells(worker_pb.WatchLoadResponse())["QUEUE"] == "?"
    assert cells(None, UNREACHABLE)["HIT %"] == "-"


def test_columns_of_the_highest_rank_are_left_out_first() -> None:
    widths, ranks = [30, 10, 10, 10, 10], [0, 0, 1, 2, 2]
    assert fitting(widths, ranks, 70) == ([0, 1, 2, 3, 4], 30)
    assert fitting(widths, ranks, 58) == ([0, 1, 2, 3, 4], NAME_WIDTH_MIN)
    assert fitting(widths, ranks, 57) == ([0, 1, 2, 3], 27)
    assert fitting(widths, ranks, 47) == ([0, 1, 2], 27)
    assert fitting(widths, ranks, 5) == ([0, 1], NAME_WIDTH_MIN), "what matters most stays"
    assert fitting([6, 10], [0, 1], 16) == ([0, 1], 6)


def test_a_long_name_keeps_both_its_ends() -> None:
    names = [f"tandem-prefill-7c9d8f6b5-{end}" for end in ("x2k4q", "x2k4r")]
    assert [shortened(name, 16) for name in names] == ["tandem-…b5-x2k4q", "tandem-…b5-x2k4r"]
    assert shortened("decode-0", 8) == "decode-0"
    assert shortened("decode-10", 8) == "dec…e-10"
