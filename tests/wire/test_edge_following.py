"""From a registry to Envoy's endpoints: each change once, never an empty list, and a retry of a failed write."""

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
from tests.wire.support.publishing_registry import PublishingRegistry, publishing

A, B = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 1)


@dataclass
class Applied:
    """The lists that were applied to Envoy, and how often that still fails."""

    lists: list[tuple[Endpoint, ...]] = field(default_factory=list)
    refusals: int = 0

    def __call__(self, endpoints: Sequence[Endpoint]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise OSError("no space left on device")
        self.lists.append(tuple(endpoints))

    async def until(self, *lists: tuple[Endpoint, ...]) -> None:
        await assert_eventually(lambda: self.lists, lambda seen: seen == list(lists), what="Envoy's endpoints")


@dataclass
class Dns:
    """A name's addresses, as long as there are any."""

    addresses: tuple[str, ...] = ("10.0.0.1",)

    async def ask(self, host: str) -> tuple[str, ...]:
        if not self.addresses:
            raise OSError("no server responds")
        return self.addresses


@contextlib.asynccontextmanager
async def following(dns: Dns | None = None) -> AsyncIterator[tuple[PublishingRegistry, Discovery]]:
    async with publishing() as (registry, address):
        discovery = Discovery(FrontendWatch([address]), Names((dns or Dns()).ask), refresh_s=0.05)
        try:
            yield registry, discovery
        finally:
            await discovery.stop()


async def test_each_change_is_applied_to_envoy_and_never_an_empty_list() -> None:
    async with following() as (registry, discovery):
        registry.publish("10.0.0.1:1")
        assert await discovery.first() == (A,)
        applied = Applied()
        discovery.follow(applied)
        registry.publish("10.0.0.1:1", "10.0.0.2:1")
        await applied.until((A, B))
        registry.publish()
        registry.publish("10.0.0.2:1")
        await applied.until((A, B), (B,))


async def test_frontends_of_different_models_all_get_requests() -> None:
    """Each serves every model: the one in its entry is only the one that it has files of."""
    async with following() as (registry, discovery):
        registry.publish("10.0.0.1:1=a")
        assert await discovery.first() == (A,)
        applied = Applied()
        discovery.follow(applied)
        registry.publish("10.0.0.1:1=a", "10.0.0.2:1=b")
        await applied.until((A, B))
        registry.publish("10.0.0.2:1=b", "10.0.0.1:1=a", draining=("10.0.0.1:1",))
        await applied.until((A, B), (Endpoint("10.0.0.1", 1, is_draining=True), B))


async def test_a_failed_write_is_repeated() -> None:
    async with following() as (registry, discovery):
        registry.publish("10.0.0.1:1")
        await discovery.first()
        applied = Applied(refusals=2)
        discovery.follow(applied)
        registry.publish("10.0.0.2:1")
        await applied.until((B,))
        assert applied.refusals == 0


async def test_a_name_is_looked_up_again_and_its_last_answer_is_kept() -> None:
    dns = Dns()
    async with following(dns) as (registry, discovery):
        registry.publish("frontend:1")
        assert await discovery.first() == (A,)
        applied = Applied()
        discovery.follow(applied)
        dns.addresses = ("10.0.0.2",)
        await applied.until((B,))
        dns.addresses = ()
        registry.publish("frontend:1", "10.0.0.1:1")
        await applied.until((B,), (A, B))


async def test_a_start_without_frontends_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_edge.discovery.FIRST_TIMEOUT_S", 0.2)
    async with following() as (registry, discovery):
        assert await discovery.first() == ()
        applied = Applied()
        discovery.follow(applied)
        registry.publish("10.0.0.1:1")
        await applied.until((A,))


async def test_a_defect_ends_discovery_with_its_error() -> None:
    def defect(endpoints: Sequence[Endpoint]) -> None:
        raise ZeroDivisionError

    async with following() as (registry, discovery):
        registry.publish("10.0.0.1:1")
        await discovery.first()
        task = discovery.follow(defect)
        registry.publish("10.0.0.2:1")
        with pytest.raises(ZeroDivisionError):
            await task
