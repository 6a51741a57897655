"""A group of Tandem's fake workers in this process, each with its own port and registration."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.grpc_wire import GrpcServer
from benchmarks.peers.words import Words
from benchmarks.peers.workers.contract1 import Contract1Worker
from benchmarks.peers.workers.contract2 import VERSION, Contract2Worker
from benchmarks.peers.workers.listening import HOST, Listeners
from benchmarks.peers.workers.registering import Registrations
from benchmarks.peers.workers.steps import Pace
from benchmarks.peers.workers.tandem_worker import FakeWorker, capabilities
from tandem.api.types.v1 import worker_pb2

BOOTSTRAP_PORT = 8998
"""Where prefill engines would meet decode engines; none ever connects."""


class TandemFleet:
    """Fake workers of both roles, by one of the contracts."""

    def __init__(self, contract: int, words: Words, pace: Pace) -> None:
        self._contract = contract
        self._words = words
        self._pace = pace
        self._workers: list[FakeWorker] = []
        self._registrations: Registrations | None = None
        self.listeners = Listeners()
        self.waits: list[tuple[int, float]] = []

    async def open(self, options: dict[str, Any]) -> dict[str, list[int]]:
        """Serve, and enter the registry if there is one. Returns the ports by role."""
        roles = {"prefill": worker_pb2.WORKER_ROLE_PREFILL, "decode": worker_pb2.WORKER_ROLE_DECODE}
        facts = {
            role: capabilities(Path(options["model"]), options["model_name"], number) for role, number in roles.items()
        }
        ports: dict[str, list[int]] = {role: [] for role in roles}
        for role, number in roles.items():
            for place in range(options[role]):
                worker = await self._serve(f"{role}-{place}", number, facts[role])
                self._workers.append(worker)
                ports[role].append(int(worker.identity.address.rpartition(":")[2]))
        if options.get("registry"):
            self._registrations = Registrations(options["registry"])
            await self._registrations.open([worker.identity for worker in self._workers])
        return ports

    @property
    def starts(self) -> dict[str, int]:
        """Epochs by worker id."""
        return {worker.identity.worker_id: worker.identity.epoch for worker in self._workers}

    async def _serve(self, worker_id: str, role: Any, facts: worker_pb2.WorkerCapabilities) -> FakeWorker:
        identity = worker_pb2.Worker(
            worker_id=worker_id,
            epoch=time.time_ns() // 1_000_000,
            role=role,
            capabilities=facts,
            state=worker_pb2.WORKER_STATE_SERVING,
            release="benchmark",
        )
        if role == worker_pb2.WORKER_ROLE_PREFILL:
            identity.bootstrap.host, identity.bootstrap.port = HOST, BOOTSTRAP_PORT
        if self._contract == VERSION:
            identity.leg_contract = VERSION
        kind = Contract2Worker if self._contract == VERSION else Contract1Worker
        worker: FakeWorker = kind(identity, self._words, self._pace, self.waits)
        methods = worker.methods()
        worker.identity.address = f"{HOST}:{await self.listeners.open(partial(GrpcServer, methods))}"
        return worker
