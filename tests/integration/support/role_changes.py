"""Role changes of a cluster's workers, and a load whose every token is compared with what it must be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import role_change_pb2, worker_pb2
from tandem.client import calls
from tandem.client.role_calls import change_role
from tandem.domain.worker import Worker, WorkerRole, WorkerState
from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.convert import worker_from_proto
from tandem.testing.eventually import assert_eventually
from tests.integration.support.calls import Stream, generate

PREFILL, DECODE, AGGREGATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED


async def change(
    cluster: LocalCluster,
    worker_id: str,
    role: WorkerRole,
    *,
    force: bool = False,
    drain_timeout_s: float | None = None,
) -> role_change_pb2.RoleChange:
    """Change a worker's role through the registry; returns the last step. Its stages come in order."""
    steps = [
        step
        async for step in change_role(
            cluster.registry.address, worker_id, role, force=force, drain_timeout_s=drain_timeout_s
        )
    ]
    stages = [step.stage for step in steps]
    assert stages == sorted(stages)
    assert set(stages) == set(role_change_pb2.RoleChangeStage.values()) - {0}
    return steps[-1]


async def workers_of(cluster: LocalCluster) -> dict[str, Worker]:
    """All registered workers by id."""
    listed = await calls.list_workers(cluster.registry.address)
    return {entry.worker.worker_id: worker_from_proto(entry.worker) for entry in listed}


async def assert_serves(cluster: LocalCluster, before: Worker, role: WorkerRole, done: worker_pb2.Worker) -> Worker:
    """The worker is registered in its new role, at its address, in a later epoch, and says so itself."""
    worker = (await workers_of(cluster))[before.worker_id]
    assert worker == worker_from_proto(done) == await calls.worker_at(before.address)
    assert (worker.role, worker.state, worker.address) == (role, WorkerState.SERVING, before.address)
    assert worker.epoch > before.epoch
    assert (worker.bootstrap_port is not None) is (role is PREFILL)
    assert await calls.is_serving(worker.address)
    assert await calls.is_serving(worker.address, "tandem.api.prefill.v2.PrefillService") is (role is PREFILL)
    assert await calls.is_serving(worker.address, "tandem.api.decode.v2.DecodeService") is (role is not PREFILL)
    return worker


async def assert_pages_free(cluster: LocalCluster) -> None:
    """Every worker gives back all pages that requests held."""
    for process in cluster.workers:

        async def used(address: str = process.address) -> tuple[int, int]:
            load = await calls.worker_load(address)
            return load.open_legs, load.kv_used_tokens

        await assert_eventually(used, lambda found: found == (0, 0), within_s=10, what=f"pages of {process.name}")


@dataclass
class ExactLoad:
    """Steady clients. `asks` gives one request after the other, with the tokens that it must get."""

    cluster: LocalCluster
    asks: Callable[[int], Iterator[tuple[pb.GenerateRequest, list[int]]]]
    streams: list[Stream] = field(default_factory=list)
    failures: list[TandemError] = field(default_factory=list)
    wrong: list[tuple[list[int], list[int]]] = field(default_factory=list)

    async def client(self, number: int) -> None:
        for request, expected in self.asks(number):
            try:
                stream = await generate(self.cluster, request)
            except TandemError as problem:
                self.failures.append(problem)
                continue
            self.streams.append(stream)
            if stream.token_ids != expected:
                self.wrong.append((stream.token_ids, expected))

    async def wait_served_by(self, worker: Worker) -> None:
        """Return when streams have ended in which this worker had a leg of its role."""
        role = "prefill" if worker.role is PREFILL else "decode"
        seen = len(self.streams)

        async def served() -> int:
            routes = [stream.finish.route for stream in self.streams[seen:]]
            return sum(getattr(route, f"{role}_worker_id") == worker.worker_id for route in routes)

        await assert_eventually(served, lambda count: count >= 3, within_s=60, what=f"legs of {worker.worker_id}")


@contextlib.asynccontextmanager
async def exact_load(
    cluster: LocalCluster, clients: int, asks: Callable[[int], Iterator[tuple[pb.GenerateRequest, list[int]]]]
) -> AsyncIterator[ExactLoad]:
    """Clients that ask until the block ends; then nothing has failed, and each token was right."""
    load = ExactLoad(cluster, asks)
    tasks = [asyncio.create_task(load.client(number)) for number in range(clients)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [problem for problem in ended if not isinstance(problem, asyncio.CancelledError)]
    assert not load.failures, load.failures
    assert not load.wrong
