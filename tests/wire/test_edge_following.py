"""From a registry to what Envoy is told: each change once, never of nobody, again what could not be written."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest
from tandem_edge.discovery import Discovery
from tandem_edge.dns import Names
from tandem_edge.endpoints import Endpoint

from tandem.discovery.watches import FrontendWatch
from tandem.testing.eventually import assert_eventually
from tests.wire.support.telling_registry import TellingRegistry, telling

A, B = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 1)


@dataclass
class Told:
    """What Envoy was told, and whether it can be."""

    lists: list[tuple[Endpoint, ...]] = field(default_factory=list)
    refusals: int = 0

    def __call__(self, endpoints: Sequence[Endpoint]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise OSError("no space left on device")
        self.lists.append(tuple(endpoints))

    async def until(self, *lists: tuple[Endpoint, ...]) -> None:
        await assert_eventually(lambda: self.lists, lambda seen: seen == list(lists), what="what Envoy is told")


@dataclass
class Dns:
    """A name's addresses, as long as there are any."""

    addresses: tuple[str, ...] = ("10.0.0.1",)

    async def ask(self, host: str) -> tuple[str, ...]:
        if not self.addresses:
            raise OSError("nobody answers")
        return self.addresses


@contextlib.asynccontextmanager
async def following(dns: Dns | None = None) -> AsyncIterator[tuple[TellingRegistry, Discovery]]:
    async with telling() as (registry, address):
        discovery = Discovery(FrontendWatch([address]), Names((dns or Dns()).ask), refresh_s=0.05)
        try:
            yield registry, discovery
        finally:
            await discovery.stop()


async def test_envoy_is_told_each_change_and_never_of_nobody() -> None:
    async with following() as (registry, discovery):
        registry.tell("10.0.0.1:1")
        assert await discovery.first() == (A,)
        told = Told()
        discovery.follow(told)
        registry.tell("10.0.0.1:1", "10.0.0.2:1")
        await told.until((A, B))
        registry.tell()
        registry.tell("10.0.0.2:1")
        await told.until((A, B), (B,))


async def test_what_could_not_be_written_is_told_again() -> None:
    async with following() as (registry, discovery):
        registry.tell("10.0.0.1:1")
        await discovery.first()
        told = Told(refusals=2)
        discovery.follow(told)
        registry.tell("10.0.0.2:1")
        await told.until((B,))
        assert told.refusals == 0


async def test_a_name_is_looked_up_again_and_its_last_answer_is_kept() -> None:
    dns = Dns()
    async with following(dns) as (registry, discovery):
        registry.tell("frontend:1")
        assert await discovery.first() == (A,)
        told = Told()
        discovery.follow(told)
        dns.addresses = ("10.0.0.2",)
        await told.until((B,))
        dns.addresses = ()
        registry.tell("frontend:1", "10.0.0.1:1")
        await told.until((B,), (A, B))


async def test_a_start_without_frontends_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_edge.discovery.FIRST_TIMEOUT_S", 0.2)
    async with following() as (registry, discovery):
        assert await discovery.first() == ()
        told = Told()
        discovery.follow(told)
        registry.tell("10.0.0.1:1")
        await told.until((A,))


async def test_a_defect_ends_the_following_where_somebody_sees_it() -> None:
    def defect(endpoints: Sequence[Endpoint]) -> None:
        raise ZeroDivisionError

    async with following() as (registry, discovery):
        registry.tell("10.0.0.1:1")
        await discovery.first()
        task = discovery.follow(defect)
        registry.tell("10.0.0.2:1")
        with pytest.raises(ZeroDivisionError):
            await task
