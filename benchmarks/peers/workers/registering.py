"""Registers fake workers in a real registry, and renews their leases.

Owns one connection, and one stream per worker. Fails if the registry rejects a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2

AT_ONCE_MAX = 16
SIGNS_PER_LEASE = 3


class Registrations:
    """Keeps workers registered from `open` to `close`."""

    def __init__(self, registry: str) -> None:
        self._channel = grpc.aio.insecure_channel(registry)
        self._stub: Any = RegistryServiceStub(self._channel)
        self._calls: list[Any] = []

    async def open(self, workers: Sequence[worker_pb2.Worker]) -> None:
        """Return when all of them are in the registry.

        Raises:
            grpc.aio.AioRpcError: it refuses one.
        """
        await asyncio.wait_for(self._channel.channel_ready(), 30)
        room = asyncio.Semaphore(AT_ONCE_MAX)

        async def enter(worker: worker_pb2.Worker) -> None:
            async with room:
                lease = await self._stub.Register(pb.RegisterRequest(worker=worker))
            every_s = lease.time_to_live.ToNanoseconds() / 1e9 / SIGNS_PER_LEASE
            self._calls.append(self._stub.KeepAlive(_signs(lease.lease_id, every_s)))

        await asyncio.gather(*map(enter, workers))

    async def close(self) -> None:
        """Let the leases run out."""
        for call in self._calls:
            call.cancel()
        await self._channel.close()


async def _signs(lease_id: str, every_s: float) -> AsyncIterator[pb.KeepAliveRequest]:
    while True:
        yield pb.KeepAliveRequest(lease_id=lease_id)
        await asyncio.sleep(every_s)
