"""A fleet and its frontends as the console reads them, set by a test: no registry, no workers, no connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from google.protobuf.timestamp_pb2 import Timestamp
from tandem_frontend.console.feed import Report

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.domain.worker import Start, Worker, WorkerRole
from tandem.observability.fleet_sample import FrontendSample
from tests.wire.support.registry_host import make_worker

CAPACITY_TOKENS = 65_536


class ScriptedFleet:
    """See `tandem_frontend.console.feed.FleetSource`."""

    def __init__(self, *workers: Worker) -> None:
        self.view = workers
        self.loads: dict[Start, tuple[Report, Report]] = {}
        self.down = frozenset[Start]()
        self.broken = frozenset[Start]()
        self.reads = 0
        """How often the view was read."""

    def workers(self) -> tuple[Worker, ...]:
        self.reads += 1
        return self.view

    def is_live(self) -> bool:
        return True

    def reports(self, start: Start) -> tuple[Report, Report]:
        return self.loads.get(start, (None, None))

    def unhealthy(self) -> frozenset[Start]:
        return self.down

    def ejected(self) -> frozenset[Start]:
        return self.broken

    def report_all(self, at_s: int) -> None:
        """A new report of every worker, each with values of its own."""
        for number, worker in enumerate(self.view):
            used = (number * 997 + at_s * 131) % (CAPACITY_TOKENS // 2)
            load = report(
                at_s,
                running_requests=(number + at_s) % 17,
                waiting_requests=(number + at_s) % 5,
                waiting_tokens=(number * at_s) % 9_000,
                kv_used_tokens=used,
                kv_cached_tokens=CAPACITY_TOKENS // 4,
                kv_free_tokens=CAPACITY_TOKENS - CAPACITY_TOKENS // 4 - used,
                kv_capacity_tokens=CAPACITY_TOKENS,
                prompt_tokens=1_000 + 40 * at_s,
                cached_tokens=500 + 10 * at_s,
                completion_tokens=(number % 90) * at_s,
                kv_transfer_bytes=4_096 * (number % 50) * at_s,
            )
            self.loads[worker.start] = (self.reports(worker.start)[1], load)


class ScriptedFrontends:
    """See `tandem_frontend.console.feed.FrontendSource`: one frontend, with the statistics of a test."""

    def __init__(self, stats: admin_pb.WatchFiguresResponse | None = None) -> None:
        self.stats = stats
        self.is_followed = False

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        self.is_followed = True
        try:
            yield
        finally:
            self.is_followed = False

    def follow_listed(self) -> None:
        pass

    def samples(self) -> tuple[FrontendSample, ...]:
        return (FrontendSample(name="f", epoch=1, address="a:1", state="serving", health="ok", stats=self.stats),)


def report(at_s: int, **values: int) -> worker_pb.WatchLoadResponse:
    """A load report of that second."""
    return worker_pb.WatchLoadResponse(measured_time=Timestamp(seconds=at_s), epoch=1, **values)


def many_workers(count: int) -> tuple[Worker, ...]:
    """Prefill and decode workers in turn, named as `tandem up` names them."""
    roles = (WorkerRole.PREFILL, WorkerRole.DECODE)
    return tuple(
        replace(
            make_worker(f"{roles[number % 2].value}-{number // 2}", epoch=1_796_000_000_000 + number),
            role=roles[number % 2],
            address=f"10.0.{number // 250}.{number % 250}:50051",
        )
        for number in range(count)
    )
