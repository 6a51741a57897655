"""A leg cluster with a link on every hop of a request, and on the ways to the registry.

Owns the links and which hop each stands on. Frontend 0, prefill worker 1 and decode worker 1 are behind them; their
namesakes of the other number are not, so that there is another worker for each.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from tests.faults.support.cut_proxy import Cut, CutProxy, cut_proxy
from tests.faults.support.fault_cluster import CUT_WORKER, DRAWN, OUTER_HOST, Plan
from tests.faults.support.leg_cluster import LegCluster
from tests.faults.support.process_faults import free_port

CUT_PREFILL = "prefill-1"
CUT_FRONTEND = "frontend-0"
HAND_OVER_TIMEOUT_S = 1.5
"""Of the engines here: what waits for a peer that cannot be reached is bounded by them alone."""


class Hop(Enum):
    """Between whom a link stands; the value is how reports call it."""

    CLIENT = "client to frontend-0"
    PREFILL = "frontends to prefill-1"
    DECODE = "frontends to decode-1"
    BOOTSTRAP = "decode to prefill-1's bootstrap"
    WORKER_REGISTRY = "decode-1 to the registry"
    FRONTEND_REGISTRY = "frontend-0 to the registry"


class HopCluster(LegCluster):
    """See the module; use `hop_cluster`."""

    def __init__(self, plan: Plan, logs: Path, stack: AsyncExitStack) -> None:
        super().__init__(plan, logs, stack)
        self.by_hop: dict[Hop, CutProxy] = {}

    @property
    def links(self) -> list[CutProxy]:
        return list(self.by_hop.values())

    @property
    def doors(self) -> list[str]:
        """Where clients come in: the first frontend is behind a link."""
        return [self.by_hop[Hop.CLIENT].address, *(frontend.address for frontend in self.frontends[1:])]

    async def sever(self, hop: Hop, cut: Cut) -> None:
        """Cut or slow a hop."""
        await self.by_hop[hop].sever(cut)

    def worker_flags(self, name: str, registries: str) -> dict[str, str]:
        flags = super().worker_flags(name, registries)
        extra: dict[str, Any] = json.loads(flags["engine-extra"])
        extra |= {"bootstrap_timeout_s": HAND_OVER_TIMEOUT_S, "transfer_timeout_s": HAND_OVER_TIMEOUT_S}
        if name == CUT_PREFILL:
            extra["bootstrap_advertised_port"] = int(self.by_hop[Hop.BOOTSTRAP].address.rpartition(":")[2])
        return {**flags, "engine-extra": json.dumps(extra)}

    async def frontend_flags(self, name: str, registries: str) -> dict[str, str]:
        flags = await super().frontend_flags(name, registries)
        if name == CUT_FRONTEND:
            port = free_port()
            await self._link(Hop.CLIENT, f"127.0.0.1:{port}")
            link = await self._link(Hop.FRONTEND_REGISTRY, registries)
            flags |= {"port": str(port), "registry": link.address}
        return flags

    async def _start_worker(self, name: str, role: str, registries: str) -> None:
        if name not in (CUT_PREFILL, CUT_WORKER):
            await super()._start_worker(name, role, registries)
            return
        port = free_port(OUTER_HOST)
        hop = Hop.PREFILL if name == CUT_PREFILL else Hop.DECODE
        await self._link(hop, f"127.0.0.1:{port}", OUTER_HOST, port)
        own = {"port": str(port), "advertise-host": OUTER_HOST}
        if name == CUT_PREFILL:
            own["bootstrap-port"] = str(free_port(OUTER_HOST))
            await self._link(Hop.BOOTSTRAP, f"{OUTER_HOST}:{own['bootstrap-port']}", OUTER_HOST)
        else:
            own["registry"] = (await self._link(Hop.WORKER_REGISTRY, registries)).address
        await self.add(name, role, {**self.worker_flags(name, registries), **own})

    async def _link(self, hop: Hop, target: str, host: str = "127.0.0.1", port: int = 0) -> CutProxy:
        link = self.by_hop[hop] = await self._stack.enter_async_context(cut_proxy(target, host, port))
        return link


@asynccontextmanager
async def hop_cluster(logs: Path) -> AsyncIterator[HopCluster]:
    """Two prefill and two decode workers with two frontends and one registry, as long as the block."""
    async with AsyncExitStack() as stack:
        cluster = HopCluster(Plan(registries=1, frontend_flags=DRAWN), logs, stack)
        await cluster.start()
        yield cluster
