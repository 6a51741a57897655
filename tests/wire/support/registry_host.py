"""A registry in this process on a loopback port, a whole worker, and the error a call failed with."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from tandem_registry.app import RegistryApp
from tandem_registry.config import RegistryConfig

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.domain.frontend import Frontend
from tandem.domain.worker import LEG_CONTRACT, Capabilities, Worker, WorkerRole
from tandem.errors import TandemError
from tandem.rpc.convert import frontend_to_proto, worker_to_proto
from tandem.rpc.status import from_rpc_error
from tests.integration.support.consul_host import ConsulHost

TTL_S = 0.6


@asynccontextmanager
async def serve_registry(port: int = 0, ttl_s: float = TTL_S, **settings: Any) -> AsyncIterator[RegistryApp]:
    async with RegistryApp.open(RegistryConfig(port=port, lease_ttl_s=ttl_s, drain_settle_s=0.1, **settings)) as app:
        yield app


def consul_settings(consul: ConsulHost) -> dict[str, Any]:
    """Of a registry over that agent, under a name that no other test uses. Its checks are off: the workers of these
    tests are names, and nothing listens at their addresses.
    """
    return {
        "backend": "consul",
        "consul_address": consul.address,
        "consul_service": f"t-{uuid.uuid4().hex[:12]}",
        "consul_checks": False,
    }


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def make_worker(worker_id: str = "decode-0", epoch: int = 1, address: str | None = None, model: str = "tiny") -> Worker:
    capabilities = Capabilities(
        engine="simulated",
        engine_version="1",
        model=model,
        model_digest="m",
        tokenizer_digest="t",
        context_tokens_max=2048,
        kv_capacity_tokens=4096,
        running_requests_max=8,
        vocabulary_size=512,
        eos_token_ids=(2,),
        page_size_tokens=1,
        kv_dtype="float32",
        kv_layout="mha:2x2x32",
        kv_bytes_per_token=1024,
        transfer_backend="simulated",
    )
    return Worker(
        worker_id=worker_id,
        epoch=epoch,
        role=WorkerRole.DECODE,
        address=address or f"{worker_id}:1",
        capabilities=capabilities,
        leg_contract=LEG_CONTRACT,
    )


def register_request(*args: Any, **kwargs: Any) -> pb.RegisterRequest:
    return pb.RegisterRequest(worker=worker_to_proto(make_worker(*args, **kwargs)))


async def error_of(call: Awaitable[Any]) -> TandemError:
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return from_rpc_error(failure)
    raise AssertionError("the call succeeded")


def frontend_request(
    frontend_id: str = "frontend-0", epoch: int = 1, address: str | None = None, model: str = "tiny"
) -> pb.RegisterFrontendRequest:
    frontend = Frontend(frontend_id=frontend_id, epoch=epoch, address=address or f"{frontend_id}:2", model=model)
    return pb.RegisterFrontendRequest(frontend=frontend_to_proto(frontend))
