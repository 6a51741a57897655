"""Registries found through the DNS of a real Consul agent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from consul_agent import consul_agent

from tandem.errors import ServiceError
from tandem.rpc.address_book import AddressBook
from tandem.rpc.addresses import parse_srv
from tandem.rpc.resolving import resolve_srv

pytestmark = pytest.mark.timeout(60)


async def test_consul_tells_more_registries_than_fit_into_its_answers_over_udp(tmp_path: Path) -> None:
    async with consul_agent(tmp_path) as consul:
        for number in range(5):
            consul.register(f"registry-{number}", 50051 + number, "registry")
        consul.register("decode-0", 60000, "decode")
        srv = parse_srv(f"srv://registry.tandem.service.consul@127.0.0.1:{consul.dns_port}")
        assert srv is not None
        found = await resolve_srv(srv, random.Random(1))
        assert sorted(found) == [f"127.0.0.1:{50051 + number}" for number in range(5)]


async def test_a_registry_that_left_is_not_told_and_one_that_came_is(tmp_path: Path) -> None:
    async with consul_agent(tmp_path) as consul:
        form = f"srv://registry.tandem.service.consul@127.0.0.1:{consul.dns_port}"
        book = AddressBook([form], clock=iter(range(0, 10**6, 100)).__next__)
        with pytest.raises(ServiceError):
            await book.current()
        consul.register("registry-0", 50051, "registry")
        assert await book.current() == "127.0.0.1:50051"
        consul.register("registry-1", 50052, "registry")
        consul.ask("PUT", "agent/service/deregister/registry-0")
        book.failed()
        assert await book.current() == "127.0.0.1:50052"
        # An agent that has lost its memory knows no registry at all; that is no proof that there is none.
        consul.ask("PUT", "agent/service/deregister/registry-1")
        book.failed()
        assert await book.current() == "127.0.0.1:50052"
