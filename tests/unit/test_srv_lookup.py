"""Addresses from SRV records, asked of a server over TCP."""

from __future__ import annotations

import random
import socket

import pytest

from tandem.discovery.addresses import SrvName
from tandem.discovery.srv_lookup import resolve_srv
from tandem.errors import ServiceError
from tests.unit.support.dns_server import DnsServer, serving

NAME = "registry.test."
SRV = (
    (NAME, "SRV", "2 1 50051 c.test."),
    (NAME, "SRV", "1 1 50052 a.test."),
    (NAME, "SRV", "1 1 50053 b.test."),
)
HOSTS = (("a.test.", "A", "10.0.0.1"), ("b.test.", "A", "10.0.0.2"), ("c.test.", "AAAA", "fd00::3"))


async def resolved(server: DnsServer, seed: int = 1, name: str = "registry.test") -> tuple[str, ...]:
    return await resolve_srv(SrvName(name, "127.0.0.1", server.port), random.Random(seed), 0.5)


async def test_targets_are_ordered_by_priority_and_spread_among_equals() -> None:
    async with serving(DnsServer(*SRV, along=HOSTS)) as server:
        found = {await resolved(server, seed) for seed in range(20)}
        equal = ("10.0.0.1:50052", "10.0.0.2:50053")
        assert found == {(*equal, "[fd00::3]:50051"), (*reversed(equal), "[fd00::3]:50051")}
        assert set(server.asked) == {f"{NAME} SRV"}, "what came along is not asked for again"


async def test_a_target_whose_address_does_not_come_along_is_asked_for() -> None:
    async with serving(DnsServer(*SRV, *HOSTS)) as server:
        assert sorted(await resolved(server)) == ["10.0.0.1:50052", "10.0.0.2:50053", "[fd00::3]:50051"]
        assert {"a.test. A", "c.test. A", "c.test. AAAA"} <= set(server.asked)


async def test_a_target_without_an_address_is_left_out() -> None:
    async with serving(DnsServer(*SRV, along=HOSTS[:1])) as server:
        assert await resolved(server) == ("10.0.0.1:50052",)


@pytest.mark.parametrize(
    ("server", "name"),
    [(DnsServer(*SRV, *HOSTS), "unknown.test"), (DnsServer(*HOSTS), "a.test"), (DnsServer(*SRV), "registry.test")],
    ids=["no such name", "no SRV record", "no address of a target"],
)
async def test_no_address_is_an_error_that_says_the_name(server: DnsServer, name: str) -> None:
    async with serving(server):
        with pytest.raises(ServiceError, match=name):
            await resolved(server, name=name)


async def test_a_silent_server_costs_no_more_than_its_bound() -> None:
    async with serving(DnsServer(*SRV, along=HOSTS)) as server:
        server.is_silent = True
        with pytest.raises(ServiceError, match=r"registry\.test"):
            await resolved(server)


async def test_a_server_that_is_gone_is_an_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = DnsServer()
        gone.port = free.getsockname()[1]
        with pytest.raises(ServiceError, match=r"registry\.test"):
            await resolved(gone)


async def test_the_server_may_have_a_name() -> None:
    async with serving(DnsServer(*SRV, along=HOSTS)) as server:
        found = await resolve_srv(SrvName("registry.test", "localhost", server.port), random.Random(1), 2)
        assert "10.0.0.1:50052" in found
