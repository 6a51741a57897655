"""Membership as merged from all registries: each one is queried, and each lease age comes from the lease's holder.

Owns the queries and the merge; `status.py` prints the result.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.client import calls
from tandem.discovery.addresses import parse_addresses, parse_srv
from tandem.discovery.srv_lookup import resolve_srv
from tandem.errors import ConfigError, NotSupported, StartError, TandemError
from tandem.tls.paths import Tls


@dataclass(frozen=True, slots=True)
class RegistryResponse:
    """The members listed by one registry, or why it could not be queried."""

    address: str
    listed: pb.ListResponse | None
    """None: the query failed; see `problem`."""
    problem: TandemError | None = None

    @property
    def is_live(self) -> bool:
        """Whether the view is current; a registry with an in-memory backend reports no source, and is."""
        return self.listed is not None and self.listed.source != pb.VIEW_SOURCE_LAST_KNOWN

    @property
    def since(self) -> datetime | None:
        """Since when the view has had its present source; None: not reported."""
        if self.listed is None or not self.listed.HasField("source_since"):
            return None
        return self.listed.source_since.ToDatetime(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Membership:
    """All workers and frontends, and the response of each registry."""

    workers: tuple[pb.ListedWorker, ...]
    frontends: tuple[pb.ListedFrontend, ...]
    responses: tuple[RegistryResponse, ...]

    def holder_address(self, replica_id: str) -> str:
        """Address of the registry with that replica id, if it responded; else the id."""
        by_id = {r.listed.replica_id: r.address for r in self.responses if r.listed is not None}
        return by_id.get(replica_id, replica_id)


async def registry_addresses(text: str) -> list[str]:
    """Resolve --address into host:port addresses; each srv:// name is looked up once.

    Raises:
        StartError: an address is malformed.
        ServiceError: DNS has no record for a name.
    """
    try:
        parsed = [(form, parse_srv(form)) for form in parse_addresses(text)]
    except ValueError as problem:
        raise StartError(f"--address: {problem}") from None
    rng = random.Random()  # noqa: S311 -- shuffles equal SRV records, not a secret
    found = [(form,) if srv is None else await resolve_srv(srv, rng) for form, srv in parsed]
    return list(dict.fromkeys(address for addresses in found for address in addresses))


def checked_address(text: str, name: str) -> str:
    """One host:port as typed for the option or argument `name`.

    Raises:
        ConfigError: it is none.
    """
    try:
        is_address = parse_srv(text) is None
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(name, f"must be host:port, not {text!r}")
    return text


async def ask_all(addresses: Sequence[str], tls: Tls | None) -> Membership:
    """Query all registries and merge their members.

    Raises:
        StartError: an address is not that of a registry.
        TandemError: no registry responded; the error of the first one.
    """
    responses = await asyncio.gather(*(_ask(address, tls) for address in addresses))
    views = [r.listed for r in sorted(responses, key=_freshness, reverse=True) if r.listed is not None]
    if not views:
        raise responses[0].problem or StartError(f"no registry reachable at {', '.join(addresses)}")
    return Membership(
        _merged((listed.workers for listed in views), lambda entry: (entry.worker.worker_id, entry.worker.epoch)),
        _merged(
            (listed.frontends for listed in views), lambda entry: (entry.frontend.frontend_id, entry.frontend.epoch)
        ),
        tuple(responses),
    )


async def _ask(address: str, tls: Tls | None) -> RegistryResponse:
    try:
        return RegistryResponse(address, await calls.list_members(address, tls=tls))
    except NotSupported:
        raise StartError(f"{address} is not a Tandem registry") from None
    except TandemError as problem:
        return RegistryResponse(address, None, problem)


def _freshness(response: RegistryResponse) -> tuple[bool, int]:
    """Sort key: a live view before a last known one, then the higher revision."""
    return response.is_live, response.listed.revision if response.listed is not None else -1


def _merged(views: Iterable[Iterable[Any]], key: Callable[[Any], tuple[str, int]]) -> tuple[Any, ...]:
    """The entries of the first (freshest) view; one without a lease age is taken from the view that has it."""
    first, *others = [list(view) for view in views]
    aged = {key(entry): entry for view in reversed(others) for entry in view if entry.HasField("lease_age")}
    return tuple(entry if entry.HasField("lease_age") else aged.get(key(entry), entry) for entry in first)
