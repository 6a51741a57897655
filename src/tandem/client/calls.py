"""Client calls: one function per RPC, failures are raised as TandemError. For the command line, tests and benchmarks.

`tls`: client certificate, for a cluster with TLS; None: plaintext.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.api.frontend.v1 import inference_service_pb2 as frontend_pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.process.v1 import process_service_pb2 as process_pb
from tandem.api.process.v1.process_service_pb2_grpc import ProcessServiceStub
from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client.call_errors import call_error
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import worker_from_proto
from tandem.tls.paths import Tls

CALL_TIMEOUT_S = 5.0


async def generate(
    address: str, request: frontend_pb.GenerateRequest, timeout_s: float | None = None, *, tls: Tls | None = None
) -> AsyncGenerator[frontend_pb.GenerateResponse, None]:
    """Stream a generation from a frontend; closing the iterator cancels it.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.Generate(request, timeout=timeout_s)
        has_responded = False
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                has_responded = True
                yield response
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls, has_responded=has_responded) from None
        finally:
            call.cancel()


async def embed(
    address: str, request: frontend_pb.EmbedRequest, timeout_s: float | None = None, *, tls: Tls | None = None
) -> frontend_pb.EmbedResponse:
    """Embeddings from a frontend; cancelling this cancels them.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = InferenceServiceStub(channel)
        response: frontend_pb.EmbedResponse = await _response(stub.Embed(request, timeout=timeout_s), address, tls)
        return response


async def generate_events(
    address: str, request: frontend_pb.GenerateRequest, client: str, *, tls: Tls | None = None
) -> AsyncGenerator[bytes, None]:
    """Stream a generation as server-sent events, each as bytes; closing the iterator cancels it. A failure after the
    first event is the last event.

    Args:
        address: of a frontend.
        request: what to generate.
        client: the tenant and its quota, as `tandem.domain.quota.client_header` writes them.
        tls: client certificate.

    Raises:
        TandemError: the call failed before its first event, or broke.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = InferenceServiceStub(channel)
        call = stub.GenerateEvents(
            frontend_pb.GenerateEventsRequest(generate=request), metadata=(("x-client-id", client),)
        )
        has_responded = False
        try:
            while (body := await call.read()) is not grpc.aio.EOF:
                has_responded = True
                yield body.data
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls, has_responded=has_responded) from None
        finally:
            call.cancel()


async def list_models(address: str, *, tls: Tls | None = None) -> list[frontend_pb.Model]:
    """The models served by a frontend.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = InferenceServiceStub(channel)
        response = await _response(
            stub.ListModels(frontend_pb.ListModelsRequest(), timeout=CALL_TIMEOUT_S), address, tls
        )
        return list(response.models)


async def list_workers(address: str, *, tls: Tls | None = None) -> list[registry_pb.ListedWorker]:
    """The workers listed by a registry.

    Raises:
        TandemError: the call failed.
    """
    return list((await list_members(address, tls=tls)).workers)


async def list_members(address: str, *, tls: Tls | None = None) -> registry_pb.ListResponse:
    """Workers and frontends listed by a registry, and the source of its view.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = RegistryServiceStub(channel)
        response: registry_pb.ListResponse = await _response(
            stub.List(registry_pb.ListRequest(), timeout=CALL_TIMEOUT_S), address, tls
        )
        return response


async def worker_at(address: str, timeout_s: float = CALL_TIMEOUT_S, *, tls: Tls | None = None) -> Worker:
    """Identity, role and capabilities of the worker at an address.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = WorkerServiceStub(channel)
        request = worker_pb.GetCapabilitiesRequest()
        response: worker_pb.GetCapabilitiesResponse = await _response(
            stub.GetCapabilities(request, timeout=timeout_s), address, tls
        )
        return worker_from_proto(response.worker)


async def worker_load(address: str, timeout_s: float = 2.0, *, tls: Tls | None = None) -> worker_pb.WatchLoadResponse:
    """Current load of a worker.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = WorkerServiceStub(channel)
        call = stub.WatchLoad(worker_pb.WatchLoadRequest(), timeout=timeout_s)
        response: worker_pb.WatchLoadResponse = await _response(call.read(), address, tls)
        call.cancel()
        return response


async def drain_worker(address: str, epoch: int, *, tls: Tls | None = None) -> AsyncGenerator[int, None]:
    """Drain one epoch of a worker; yields its open legs whenever the number changes, down to 0.

    Raises:
        StaleEpoch: the worker was restarted.
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = WorkerServiceStub(channel)
        call = stub.Drain(worker_pb.DrainRequest(worker_epoch=epoch))
        has_responded = False
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                has_responded = True
                yield response.open_legs
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls, has_responded=has_responded) from None
        finally:
            call.cancel()


async def process_figures(address: str, *, tls: Tls | None = None) -> process_pb.GetFiguresResponse:
    """Current resource use of a process: calls, tasks, threads, descriptors, memory.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = ProcessServiceStub(channel)
        request = process_pb.GetFiguresRequest()
        call = stub.GetFigures(request, timeout=CALL_TIMEOUT_S)
        response: process_pb.GetFiguresResponse = await _response(call, address, tls)
        return response


async def is_serving(address: str, service: str = "", *, tls: Tls | None = None) -> bool:
    """grpc.health.v1 status of a process, or of one of its services.

    Raises:
        InvalidRequest: the process has no such service.
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await stub.Check(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            if failure.code() is grpc.StatusCode.NOT_FOUND:
                raise InvalidRequest("service", f"{address} has no service {service!r}") from None
            raise call_error(failure, address, tls) from None
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _response(call: Any, address: str, tls: Tls | None) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as failure:
        raise call_error(failure, address, tls) from None
