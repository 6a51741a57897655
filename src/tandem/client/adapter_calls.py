"""Calls about adapters: of operators at a registry, and of the registry at workers. Raises failures as TandemError."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client.call_errors import call_error
from tandem.domain.adapter import Adapter
from tandem.domain.worker import Worker
from tandem.rpc.channels import Channels, open_channel
from tandem.rpc.convert import adapter_from_proto
from tandem.rpc.status import from_rpc_error
from tandem.tls.paths import Tls

LOAD_TIMEOUT_S = 120.0
"""Of one worker, which hashes the files and reads them from a disk that may be slow."""
SERVE_TIMEOUT_S = 10.0
UNLOAD_TIMEOUT_S = 300.0
"""Of one worker, whose open requests of the adapter end first."""
TOTAL_TIMEOUT_S = LOAD_TIMEOUT_S + SERVE_TIMEOUT_S + UNLOAD_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter that a worker has loaded."""

    adapter: Adapter
    was_loaded: bool
    """Before the call."""
    is_served: bool


class AdapterCalls:
    """Calls at workers, over the channels of their caller."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def load(self, worker: Worker, name: str, path: str) -> Loaded:
        """Have a worker load an adapter without serving it.

        Raises:
            TandemError: the worker refused, or cannot be reached.
        """
        request = pb.LoadAdapterRequest(worker_epoch=worker.epoch, name=name, path=path)
        async with self._stub(worker) as stub:
            response = await stub.LoadAdapter(request, timeout=LOAD_TIMEOUT_S)
        return Loaded(adapter_from_proto(response.adapter), response.was_loaded, response.is_served)

    async def serve(self, worker: Worker, name: str, *, serve: bool) -> None:
        """Have a worker serve a loaded adapter, or stop to serve it. Raises as `load`."""
        request = pb.ServeAdapterRequest(worker_epoch=worker.epoch, name=name, serve=serve)
        async with self._stub(worker) as stub:
            await stub.ServeAdapter(request, timeout=SERVE_TIMEOUT_S)

    async def unload(self, worker: Worker, name: str) -> None:
        """Have a worker unload an adapter; returns when its last request has ended. Raises as `load`."""
        request = pb.UnloadAdapterRequest(worker_epoch=worker.epoch, name=name)
        async with self._stub(worker) as stub:
            await stub.UnloadAdapter(request, timeout=UNLOAD_TIMEOUT_S)

    @asynccontextmanager
    async def _stub(self, worker: Worker) -> AsyncIterator[Any]:
        try:
            yield WorkerServiceStub(self._channels.get(worker.address))
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


async def load_adapter(
    registry: str, name: str, path: str, *, model: str | None = None, tls: Tls | None = None
) -> registry_pb.LoadAdapterResponse:
    """Load an adapter on all serving workers of a model.

    Raises:
        AdapterRefused: a worker refused; none has it that did not have it before.
        TandemError: a field is wrong, or the call failed.
    """
    request = registry_pb.LoadAdapterRequest(name=name, path=path, model=model)
    async with _registry(registry, tls) as stub:
        response: registry_pb.LoadAdapterResponse = await stub.LoadAdapter(request, timeout=TOTAL_TIMEOUT_S)
        return response


async def unload_adapter(registry: str, name: str, *, tls: Tls | None = None) -> registry_pb.UnloadAdapterResponse:
    """Unload an adapter on all workers that serve it. Raises as `load_adapter`."""
    async with _registry(registry, tls) as stub:
        request = registry_pb.UnloadAdapterRequest(name=name)
        response: registry_pb.UnloadAdapterResponse = await stub.UnloadAdapter(request, timeout=TOTAL_TIMEOUT_S)
        return response


@asynccontextmanager
async def _registry(address: str, tls: Tls | None) -> AsyncIterator[Any]:
    async with open_channel(address, tls) as channel:
        try:
            yield RegistryServiceStub(channel)
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls, has_responded=False) from None
