"""A leg cluster behind a real Envoy, with a link between Envoy and one of its frontends.

Owns the link and the edge's process. Frontend 0 is registered with the address of the link, so that Envoy finds it
there; the other frontend is reached as it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from tandem.local_cluster.child_process import ClusterProcess
from tests.faults.support.cut_proxy import CutProxy, cut_proxy
from tests.faults.support.fault_cluster import OUTER_HOST, Plan
from tests.faults.support.leg_cluster import LegCluster
from tests.faults.support.process_faults import free_port

CUT_FRONTEND = "frontend-0"
HEALTH_INTERVAL_S = 0.5
NOTICED_S = 2 * (HEALTH_INTERVAL_S + 1.0)
"""Two health checks that wait for a second each: after that Envoy sends a silent frontend nothing more."""


class EdgeCluster(LegCluster):
    """See the module; use `edge_cluster`."""

    link: CutProxy
    """Between Envoy and `CUT_FRONTEND`."""

    @property
    def links(self) -> list[CutProxy]:
        return [self.link]

    @property
    def edge(self) -> ClusterProcess:
        return self.processes["edge"]

    @property
    def envoy(self) -> psutil.Process:
        """The edge's child."""
        (envoy,) = psutil.Process(self.edge.pid).children()
        return envoy

    async def start(self) -> None:
        await super().start()
        flags = {"registry": self.registries[0].address, "health-interval-s": str(HEALTH_INTERVAL_S)}
        await self.add("edge", "edge", flags)

    async def frontend_flags(self, name: str, registries: str) -> dict[str, str]:
        flags = await super().frontend_flags(name, registries)
        if name == CUT_FRONTEND:
            port = free_port(OUTER_HOST)
            self.link = await self._stack.enter_async_context(cut_proxy(f"127.0.0.1:{port}", OUTER_HOST, port))
            flags |= {"port": str(port), "advertise-host": OUTER_HOST}
        return flags


@asynccontextmanager
async def edge_cluster(logs: Path) -> AsyncIterator[EdgeCluster]:
    """Two frontends behind one edge, with two workers of each role, as long as the block."""
    async with AsyncExitStack() as stack:
        cluster = EdgeCluster(Plan(registries=1), logs, stack)
        await cluster.start()
        yield cluster
