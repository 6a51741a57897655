"""A steady load of small requests on a cluster, with everything it has met."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tandem.errors import TandemError
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.support.calls import Stream, generate, request_of

CLIENTS = 6


@dataclass
class Load:
    """What a steady load of requests has met."""

    streams: list[Stream] = field(default_factory=list)
    failures: list[TandemError] = field(default_factory=list)
    times_s: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each stream, on time.monotonic."""

    async def client(self, cluster: LocalCluster, number: int) -> None:
        while True:
            began_s = time.monotonic()
            try:
                self.streams.append(await generate(cluster, request_of(f"Once {number}", max_tokens=10)))
                self.times_s.append((began_s, time.monotonic()))
            except TandemError as problem:
                self.failures.append(problem)
            await asyncio.sleep(0.01)

    def since(self, time_s: float) -> list[Stream]:
        """Streams that began after a time and have ended well."""
        return [stream for stream, (began_s, _) in zip(self.streams, self.times_s, strict=True) if began_s >= time_s]

    async def wait_streams(self, count: int) -> None:
        """Return when so many more streams have ended well."""
        wanted = len(self.streams) + count

        async def ended() -> int:
            return len(self.streams)

        await assert_eventually(ended, lambda ended: ended >= wanted, within_s=20, what=f"{count} more streams")


@contextlib.asynccontextmanager
async def under_load(cluster: LocalCluster) -> AsyncIterator[Load]:
    load = Load()
    tasks = [asyncio.create_task(load.client(cluster, number)) for number in range(CLIENTS)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
