"""Elections in Consul: one key for each, written by compare-and-set, so that registries agree on the leader.

Consul's sessions are not used: they last at least 10 s and delay the next lock by 15 s. As etcd's and Kubernetes'
clients do, a registry lets another candidate lead once it has seen the same version of the key for the time to live, on
its own clock: no two clocks are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.clock import Clock
from tandem.errors import ServiceError
from tandem_registry.elections import Leadership


class Keys(Protocol):
    """The keys of a cluster in Consul."""

    async def read_key(self, name: str) -> tuple[bytes, int] | None:
        """Value and version of a key, from Consul's leader; None: there is none."""
        ...

    async def write_key(self, name: str, value: str, version: int) -> bool:
        """Write where the version is still that one; 0: where there is no key. Returns whether it did."""
        ...


@dataclass(frozen=True, slots=True)
class _Seen:
    version: int
    since_s: float


class ConsulElections:
    """All elections, as this registry sees them."""

    def __init__(self, keys: Keys, ttl_s: float, clock: Clock) -> None:
        self.ttl_s = ttl_s
        self._keys = keys
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    async def campaign(self, election: str, candidate_id: str, *, resign: bool = False) -> Leadership:
        """Ask to lead. Returns who leads now.

        Raises:
            ServiceError: Consul does not respond.
        """
        found = await self._keys.read_key(_key(election))
        value, version = _parsed(found)
        is_leader = value["leader"] == candidate_id
        is_over = not value["leader"] or self._is_over(election, version)
        if resign and not is_leader:
            return Leadership("", value["term"])
        if not is_leader and not is_over:
            return Leadership(value["leader"], value["term"])
        # A number that changes: Consul gives a value that is written again no new version.
        wanted = {
            "leader": "" if resign else candidate_id,
            "term": value["term"] + (not is_leader),
            "renewed": value["renewed"] + 1,
        }
        if await self._keys.write_key(_key(election), json.dumps(wanted), version):
            return Leadership(wanted["leader"], wanted["term"])
        value, version = _parsed(await self._keys.read_key(_key(election)))
        self._is_over(election, version)
        return Leadership(value["leader"], value["term"])

    async def leader(self, election: str) -> Leadership | None:
        """Who leads; None: no candidate, or one whose time to live has passed.

        Raises:
            ServiceError: Consul does not respond.
        """
        value, version = _parsed(await self._keys.read_key(_key(election)))
        if not value["leader"] or self._is_over(election, version):
            return None
        return Leadership(value["leader"], value["term"])

    def _is_over(self, election: str, version: int) -> bool:
        """Whether this version has been seen for the time to live."""
        seen = self._seen.get(election)
        if seen is None or seen.version != version:
            self._seen[election] = _Seen(version, self._clock())
            return False
        return self._clock() - seen.since_s >= self.ttl_s


def _key(election: str) -> str:
    return f"leader/{election}"


def _parsed(found: tuple[bytes, int] | None) -> tuple[dict[str, Any], int]:
    if found is None:
        return {"leader": "", "term": 0, "renewed": 0}, 0
    try:
        value = json.loads(found[0])
        return {"leader": str(value["leader"]), "term": int(value["term"]), "renewed": int(value["renewed"])}, found[1]
    except (ValueError, KeyError, TypeError):
        raise ServiceError("a key of an election in Consul is unreadable: delete it") from None
