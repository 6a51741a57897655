"""What all registries say of the fleet, put together: each is asked, and each lease's age comes from who keeps it.

Owns the asking and the merging; showing is `status.py`'s.
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
from tandem.errors import NotSupported, StartError, TandemError
from tandem.tls.paths import Tls


@dataclass(frozen=True, slots=True)
class Answer:
    """What one registry says."""

    address: str
    listed: pb.ListResponse | None
    """None: it does not answer."""
    problem: TandemError | None = None

    @property
    def is_live(self) -> bool:
        """Whether what it says holds now; a registry that does not say since when keeps it itself."""
        return self.listed is not None and self.listed.source != pb.VIEW_SOURCE_LAST_KNOWN

    @property
    def since(self) -> datetime | None:
        """Since when its view comes from where it does; None: it does not say."""
        if self.listed is None or not self.listed.HasField("source_since"):
            return None
        return self.listed.source_since.ToDatetime(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Membership:
    """The fleet."""

    workers: tuple[pb.ListedWorker, ...]
    frontends: tuple[pb.ListedFrontend, ...]
    answers: tuple[Answer, ...]

    def keeper_address(self, replica_id: str) -> str:
        """Address of a registry, where it has answered; else its id."""
        by_id = {answer.listed.replica_id: answer.address for answer in self.answers if answer.listed is not None}
        return by_id.get(replica_id, replica_id)


async def registry_addresses(text: str) -> list[str]:
    """The addresses behind a setting's words for registries: DNS is asked once for each name.

    Raises:
        StartError: one of the forms is malformed.
        ServiceError: DNS has no answer for a name.
    """
    try:
        parsed = [(form, parse_srv(form)) for form in parse_addresses(text)]
    except ValueError as problem:
        raise StartError(f"--address: {problem}") from None
    rng = random.Random()  # noqa: S311 -- an order of equals, protects nothing
    found = [(form,) if srv is None else await resolve_srv(srv, rng) for form, srv in parsed]
    return list(dict.fromkeys(address for addresses in found for address in addresses))


async def ask_all(addresses: Sequence[str], tls: Tls | None) -> Membership:
    """What the registries say together.

    Raises:
        StartError: one of the addresses is not a registry.
        TandemError: no registry answers; what the first one failed with.
    """
    answers = await asyncio.gather(*(_ask(address, tls) for address in addresses))
    heard = [answer.listed for answer in sorted(answers, key=_weight, reverse=True) if answer.listed is not None]
    if not heard:
        raise answers[0].problem or StartError(f"no registry answers at {', '.join(addresses)}")
    return Membership(
        _merged((listed.workers for listed in heard), lambda entry: (entry.worker.worker_id, entry.worker.epoch)),
        _merged(
            (listed.frontends for listed in heard), lambda entry: (entry.frontend.frontend_id, entry.frontend.epoch)
        ),
        tuple(answers),
    )


async def _ask(address: str, tls: Tls | None) -> Answer:
    try:
        return Answer(address, await calls.list_members(address, tls=tls))
    except NotSupported:
        raise StartError(f"{address} is not a registry of Tandem") from None
    except TandemError as problem:
        return Answer(address, None, problem)


def _weight(answer: Answer) -> tuple[bool, int]:
    """The view that counts is live, and the latest of those."""
    return answer.is_live, answer.listed.revision if answer.listed is not None else -1


def _merged(views: Iterable[Iterable[Any]], key: Callable[[Any], tuple[str, int]]) -> tuple[Any, ...]:
    """The entries of the first view; where it does not know a lease's age, from the one that does."""
    first, *others = [list(view) for view in views]
    aged = {key(entry): entry for view in reversed(others) for entry in view if entry.HasField("lease_age")}
    return tuple(entry if entry.HasField("lease_age") else aged.get(key(entry), entry) for entry in first)
