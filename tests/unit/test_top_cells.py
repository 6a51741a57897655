"""Cells of `tandem top`: the queue and the hit rate of a worker."""

from __future__ import annotations

from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.cli.top.cells import WORKER_COLUMNS, cell
from tandem.cli.top.sample import SERVING, UNREACHABLE, WorkerSample


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
