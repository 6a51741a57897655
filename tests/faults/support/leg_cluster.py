"""A fault cluster whose simulated engines can be held in a phase, and whose memory and legs can be counted.

Owns the control files of the engines, the proof that a rule in them has fired, and what must be true of idle workers.
Membership is in the memory of one registry: Consul's faults are judged elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.client import calls
from tandem.errors import TandemError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.testing.eventually import assert_eventually
from tests.faults.support.fault_cluster import DRAWN, FaultCluster, Plan

ENGINE: dict[str, Any] = {"decode_step_s": 0.006}
IDLE_WITHIN_S = 1.0
"""What is promised of legs no client waits for."""
BUSY_MACHINE_S = 1.0
"""Slack of every bound in seconds that is judged here: other work runs on the same cores."""

AUDIT_EVERY_S = 0.25
AUDIT_TIMEOUT_S = 0.5
HELD_AT = {"bootstrapping": "bootstrap", "prefilling": "prefill_chunk", "transferring": "transfer_middle"}
"""The point of a prefill engine at which a request stays in a phase. Who decodes needs no hold."""


class LegCluster(FaultCluster):
    """See the module; use `leg_cluster`."""

    engine = ENGINE
    """Options of every worker's engine."""

    def worker_flags(self, name: str, registries: str) -> dict[str, str]:
        extra = {**self.engine, "control_file": str(self.logs / f"{name}.rules")}
        return {**super().worker_flags(name, registries), "engine-extra": json.dumps(extra)}

    def inject(self, name: str, *rules: dict[str, Any]) -> None:
        """Give a worker's engine these faults in place of those it has."""
        inject(self.logs / f"{name}.rules", *rules)

    def release(self) -> None:
        """End every fault in every engine."""
        for worker in self.workers:
            self.inject(worker.name)

    def fired(self, name: str) -> list[dict[str, Any]]:
        """Every fault that has happened in that worker's engine."""
        return fired(self.logs / f"{name}.rules")

    @asynccontextmanager
    async def audited(self) -> AsyncIterator[list[int]]:
        """Add up the pages of every worker again and again while the block runs; yields what is unaccounted for."""
        found: list[int] = []
        audit = asyncio.create_task(self._audit(found), name="audit")
        try:
            yield found
        finally:
            audit.cancel()
            await asyncio.wait({audit})

    async def _audit(self, found: list[int]) -> None:
        while True:
            for worker in self.workers:
                # Who is dead or stands still is asked again when it is back.
                with contextlib.suppress(TandemError):
                    found.append(unaccounted(await calls.worker_load(worker.address, AUDIT_TIMEOUT_S)))
            await asyncio.sleep(AUDIT_EVERY_S)

    async def assert_idle(self, within_s: float = IDLE_WITHIN_S + BUSY_MACHINE_S) -> None:
        """No leg, no request and no page of one is left with any worker that runs, and every page is accounted for."""
        await assert_idle([worker for worker in self.workers if worker.runs], within_s)


def inject(control_file: Path, *rules: dict[str, Any]) -> None:
    """Replace the rules of the engine that follows this file."""
    draft = control_file.with_suffix(".draft")
    draft.write_text(json.dumps(rules))
    os.replace(draft, control_file)


def fired(control_file: Path) -> list[dict[str, Any]]:
    """What has fired in the engine that follows this file."""
    fired = control_file.with_name(control_file.name + ".fired")
    return [json.loads(line) for line in fired.read_text().splitlines()] if fired.exists() else []


async def assert_idle(workers: list[ClusterProcess], within_s: float = IDLE_WITHIN_S + BUSY_MACHINE_S) -> None:
    """See `LegCluster.assert_idle`."""

    async def left() -> dict[str, str]:
        found = {worker.name: held_by_legs(await calls.worker_load(worker.address)) for worker in workers}
        return {name: what for name, what in found.items() if what}

    await assert_eventually(left, lambda found: not found, within_s=within_s, what="workers without a leg")


def held_by_legs(load: worker_pb.WatchLoadResponse) -> str:
    """What a worker still holds for requests, in words; empty: nothing."""
    counts = {
        "open legs": load.open_legs,
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "in transfer": load.transferring_requests,
        "KV tokens": load.kv_used_tokens,
        "KV tokens unaccounted for": unaccounted(load),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def unaccounted(load: worker_pb.WatchLoadResponse) -> int:
    """Tokens of the pool that are neither used nor cached nor free. Engines without these measurements have none."""
    if not load.HasField("kv_free_tokens"):
        return 0
    return load.kv_capacity_tokens - load.kv_used_tokens - load.kv_cached_tokens - load.kv_free_tokens


@asynccontextmanager
async def leg_cluster(
    logs: Path, plan: Plan | None = None, engine: dict[str, Any] | None = None
) -> AsyncIterator[LegCluster]:
    """Two prefill and two decode workers with two frontends, as long as the block, unless the plan says otherwise."""
    async with AsyncExitStack() as stack:
        cluster = LegCluster(plan or Plan(registries=1, frontend_flags=DRAWN), logs, stack)
        cluster.engine = engine or ENGINE
        await cluster.start()
        yield cluster
