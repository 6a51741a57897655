"""What channels of one process have to do with each other: nothing."""

from __future__ import annotations

import socket
from typing import Any

import grpc
import pytest

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.rpc.channels import open_channel
from tests.wire.support.registry_host import serve_registry


async def test_a_new_channel_does_not_wait_for_the_back_off_of_another_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    async with open_channel(address) as former:
        refused: Any = RegistryServiceStub(former)
        for _ in range(4):
            # Each attempt to connect that fails makes the next one wait longer, up to a second.
            with pytest.raises(grpc.aio.AioRpcError):
                await refused.List(pb.ListRequest(), wait_for_ready=True, timeout=0.5)
        async with serve_registry(port), open_channel(address) as new:
            stub: Any = RegistryServiceStub(new)
            assert not (await stub.List(pb.ListRequest(), timeout=5)).workers
