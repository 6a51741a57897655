"""The fake workers alone, called directly: the baseline for every other row."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.peers.children import HOST
from benchmarks.peers.clocks import Parts
from benchmarks.peers.systems.door import Door, Running, Surroundings, fleet


@dataclass(frozen=True)
class Legs:
    """Tandem's fake workers of one contract."""

    contract: int
    name: str = "legs"

    @contextlib.asynccontextmanager
    async def start(self, around: Surroundings) -> AsyncIterator[Running]:
        """Workers, and nothing before them."""
        async with fleet(f"contract{self.contract}", around) as workers:
            addresses = [f"{HOST}:{port}" for port in workers.ports["decode"]]
            parts = Parts([], [], [workers.helper.pid])
            label = f"legs alone, contract {self.contract}"
            door = Door(label, f"contract{self.contract}", addresses, parts, {"starts": workers.starts})
            yield Running([door], workers.helper)
