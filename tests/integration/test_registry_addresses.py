"""Registries found through the DNS of a real Consul agent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tandem.discovery.address_book import AddressBook
from tandem.discovery.addresses import parse_srv
from tandem.discovery.srv_lookup import resolve_srv
from tandem.errors import ServiceError
from tests.integration.support.consul_host import ConsulHost, consul_agent

pytestmark = pytest.mark.timeout(60)


async def register(consul: ConsulHost, service_id: str, port: int, tag: str = "registry") -> None:
    service = {"ID": service_id, "Name": "tandem", "Tags": [tag], "Address": "127.0.0.1", "Port": port}
    await consul.access.put("/v1/agent/service/register", service)


async def test_consul_lists_more_registries_than_fit_into_a_udp_response(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path) as consul:
        for number in range(5):
            await register(consul, f"registry-{number}", 50051 + number)
        await register(consul, "decode-0", 60000, "decode")
        srv = parse_srv(f"srv://registry.tandem.service.consul@{consul.dns}")
        assert srv is not None
        found = await resolve_srv(srv, random.Random(1))
        assert sorted(found) == [f"127.0.0.1:{50051 + number}" for number in range(5)]


async def test_a_registry_that_left_is_not_called_and_a_new_one_is(consul_binary: Path, tmp_path: Path) -> None:
    async with consul_agent(consul_binary, tmp_path) as consul:
        form = f"srv://registry.tandem.service.consul@{consul.dns}"
        book = AddressBook([form], clock=iter(range(0, 10**6, 100)).__next__)
        with pytest.raises(ServiceError):
            await book.current()
        await register(consul, "registry-0", 50051)
        assert await book.current() == "127.0.0.1:50051"
        await register(consul, "registry-1", 50052)
        await consul.access.put("/v1/agent/service/deregister/registry-0")
        book.failed()
        assert await book.current() == "127.0.0.1:50052"
        # An agent that has lost its memory knows no registry at all; that is no proof that there is none.
        await consul.access.put("/v1/agent/service/deregister/registry-1")
        book.failed()
        assert await book.current() == "127.0.0.1:50052"
