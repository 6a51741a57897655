"""Elections at one registry, and over several registries that share keys: never two leaders, and later terms."""

from __future__ import annotations

import pytest
from tandem_registry.backends.consul.elections import ConsulElections
from tandem_registry.elections import Elections, Leadership

from tandem.errors import ServiceError

TTL_S = 15.0
NAME = "roles-of-workers"


class ScriptedClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class ScriptedKeys:
    """Keys with versions; an equal value keeps its version, as in Consul."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.before_write: list[ConsulElections] = []

    async def read_key(self, name: str) -> tuple[bytes, int] | None:
        return self.keys.get(name)

    async def write_key(self, name: str, value: str, version: int) -> bool:
        if self.before_write:
            await self.before_write.pop().campaign(NAME, "faster")
        present, current = self.keys.get(name, (b"", 0))
        if version != current:
            return False
        if present != value.encode():
            self.keys[name] = value.encode(), current + 1
        return True


def test_one_candidate_leads_until_its_time_is_over() -> None:
    clock = ScriptedClock()
    elections = Elections(TTL_S, clock, first_term=7)
    assert elections.campaign(NAME, "a") == Leadership("a", 8)
    clock.now_s += TTL_S - 1
    assert elections.campaign(NAME, "b") == Leadership("a", 8)
    assert elections.campaign(NAME, "a") == Leadership("a", 8)
    clock.now_s += TTL_S - 1
    assert elections.leader(NAME) == Leadership("a", 8)
    clock.now_s += 1
    assert elections.leader(NAME) is None
    assert elections.campaign(NAME, "b") == Leadership("b", 9)
    assert elections.campaign(NAME, "a") == Leadership("b", 9)
    assert elections.campaign("other", "a") == Leadership("a", 10)


def test_a_leader_that_resigns_makes_room_at_once() -> None:
    clock = ScriptedClock()
    elections = Elections(TTL_S, clock, first_term=0)
    elections.campaign(NAME, "a")
    assert elections.campaign(NAME, "b", resign=True).leader_id == "a"
    elections.campaign(NAME, "a", resign=True)
    assert elections.campaign(NAME, "b") == Leadership("b", 2)


async def test_registries_that_share_keys_agree_on_the_leader() -> None:
    clock, keys = ScriptedClock(), ScriptedKeys()
    one, two = (ConsulElections(keys, TTL_S, clock) for _ in range(2))
    assert await one.leader(NAME) is None
    assert await one.campaign(NAME, "a") == Leadership("a", 1)
    assert await two.campaign(NAME, "b") == Leadership("a", 1)
    for _ in range(5):
        clock.now_s += TTL_S - 1
        assert await one.campaign(NAME, "a") == Leadership("a", 1)
        assert await two.campaign(NAME, "b") == Leadership("a", 1)
    clock.now_s += TTL_S
    assert await two.campaign(NAME, "b") == Leadership("b", 2)
    assert await one.campaign(NAME, "a") == Leadership("b", 2)
    assert await one.leader(NAME) == Leadership("b", 2)
    await two.campaign(NAME, "b", resign=True)
    assert await one.leader(NAME) is None
    assert await one.campaign(NAME, "a") == Leadership("a", 3)


async def test_a_registry_that_has_just_started_waits_for_a_leader_it_has_not_seen() -> None:
    clock, keys = ScriptedClock(), ScriptedKeys()
    await ConsulElections(keys, TTL_S, clock).campaign(NAME, "a")
    clock.now_s += 10 * TTL_S
    new = ConsulElections(keys, TTL_S, clock)
    assert await new.campaign(NAME, "b") == Leadership("a", 1)
    clock.now_s += TTL_S
    assert await new.campaign(NAME, "b") == Leadership("b", 2)


async def test_of_two_candidates_at_once_the_faster_one_leads() -> None:
    clock, keys = ScriptedClock(), ScriptedKeys()
    keys.before_write = [ConsulElections(keys, TTL_S, clock)]
    slower = ConsulElections(keys, TTL_S, clock)
    assert await slower.campaign(NAME, "slower") == Leadership("faster", 1)


async def test_a_key_that_someone_else_wrote_is_an_error() -> None:
    keys = ScriptedKeys()
    keys.keys[f"leader/{NAME}"] = b"not json", 3
    with pytest.raises(ServiceError, match="is unreadable"):
        await ConsulElections(keys, TTL_S, ScriptedClock()).campaign(NAME, "a")
