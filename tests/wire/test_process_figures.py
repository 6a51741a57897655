"""What a process says it holds: calls that stay open are seen, and gone when they are."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.client import calls
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import serve_registry

pytestmark = pytest.mark.usefixtures("server_type")


async def test_open_calls_are_counted_until_they_end() -> None:
    async with serve_registry() as app:

        async def open_calls() -> int:
            return (await calls.process_figures(app.address)).open_calls

        before = await calls.process_figures(app.address)
        assert before.pid == os.getpid()
        assert before.open_calls == 0
        assert before.resident_bytes > 10 * 2**20
        async with open_channel(app.address) as channel:
            stub: Any = RegistryServiceStub(channel)
            watches = [stub.Watch(pb.WatchRequest()) for _ in range(3)]
            for watch in watches:
                assert (await watch.read()).HasField("snapshot")
            held = await calls.process_figures(app.address)
            assert held.open_calls == 3
            assert held.descriptors > before.descriptors
            assert held.tasks > before.tasks
            for watch in watches:
                watch.cancel()
            await assert_eventually(open_calls, lambda count: count == 0, within_s=2, what="no open call")


async def test_a_refused_call_is_closed_too() -> None:
    async with serve_registry() as app:
        async with open_channel(app.address) as channel:
            stub: Any = RegistryServiceStub(channel)
            for _ in range(5):
                failed = await stub.Register(pb.RegisterRequest()).code()
                assert failed is not None
        counts = await calls.process_figures(app.address)
        assert counts.open_calls == 0
        assert dict(counts.failed_calls) == {"INVALID_REQUEST": 5}
