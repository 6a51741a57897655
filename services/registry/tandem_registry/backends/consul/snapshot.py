"""Which entries of a Consul response count, and which members are alive: the same on every replica at the same index.

Pure. Owns the rules that merge the entries of several agents into one view; knows neither the time nor its own replica.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import Worker, WorkerState
from tandem_registry.backends.consul.records import Record, Replica
from tandem_registry.view import Change, Health, Listed, RemovalReason, Removed, View

Key = tuple[str, str]
"""Kind and id of a member."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One service instance written by a registry, as an agent registered it."""

    node: str
    service_id: str
    record: Record
    health: Health
    """Result of its own checks."""
    is_node_alive: bool = True
    """Whether the agent that registered it is alive."""


@dataclass(frozen=True, slots=True)
class ConsulSnapshot:
    """All entries at one index, and what is derived from them."""

    index: int = 0
    entries: tuple[Entry, ...] = ()
    winners: Mapping[Key, Entry] = field(default_factory=dict)
    """The winning entry of each member, tombstones included."""
    members: Mapping[Key, Entry] = field(default_factory=dict)
    """The visible workers and frontends, ordered by key."""
    replicas: frozenset[str] = frozenset()
    """Ids of the live registries."""
    by_lease: Mapping[str, Entry] = field(default_factory=dict)
    """Winning entries without tombstones, by lease id."""

    def view(self, registry_id: str, ages_s: Mapping[str, float | None] | None = None) -> View:
        """As the registry serves it; `ages_s`: lease ages, by lease id, of the leases that this replica owns."""
        ages_s = ages_s or {}
        workers: list[Listed[Worker]] = []
        frontends: list[Listed[Frontend]] = []
        for entry in self.members.values():
            record, member = entry.record, entry.record.member
            age_s = ages_s.get(record.lease_id)
            if isinstance(member, Worker):
                workers.append(Listed(member, age_s, record.owner, entry.health))
            elif isinstance(member, Frontend):
                frontends.append(Listed(member, age_s, record.owner, entry.health))
        return View(registry_id, self.index, tuple(workers), tuple(frontends))


def observed_of(index: int, entries: Iterable[Entry]) -> ConsulSnapshot:
    """Build the snapshot of the entries of one response."""
    everything = tuple(sorted(entries, key=lambda entry: (entry.node, entry.service_id)))
    winners: dict[Key, Entry] = {}
    for entry in everything:
        rival = winners.get(entry.record.key)
        if rival is None or entry.record.rank > rival.record.rank:
            winners[entry.record.key] = entry
    at_address = _newest_at_each_address(winners)
    members = {
        key: entry
        for key, entry in sorted(winners.items())
        if at_address[entry.record.member.address] is entry and _is_visible(entry)
    }
    return ConsulSnapshot(
        index=index,
        entries=everything,
        winners=winners,
        members=members,
        replicas=frozenset(
            entry.record.member.replica_id
            for entry in at_address.values()
            if isinstance(entry.record.member, Replica) and entry.is_node_alive and entry.health is not Health.CRITICAL
        ),
        by_lease={
            entry.record.lease_id: entry
            for entry in winners.values()
            if entry.record.lease_id and not entry.record.is_gone
        },
    )


def change_between(
    before: ConsulSnapshot, after: ConsulSnapshot, reasons: Mapping[tuple[str, str, int], RemovalReason] | None = None
) -> Change | None:
    """The change from one view to another; None when the views are equal. `reasons`: known removal reasons, by
    incarnation.
    """
    reasons = reasons or {}
    upserted, removed = [], []
    for key, entry in after.members.items():
        known = before.members.get(key)
        if known is None or (known.record is not entry.record and known.record.member != entry.record.member):
            upserted.append(_member(entry))
    for key, entry in before.members.items():
        now = after.members.get(key)
        if now is None or now.record.member.epoch != entry.record.member.epoch:
            member = _member(entry)
            start = (member.kind, member.member_id, member.epoch)
            default = _reason(entry, now, after)
            removed.append(Removed(member, reasons.get(start, default)))
    if not upserted and not removed:
        return None
    return Change(revision=after.index, upserted=tuple(upserted), removed=tuple(removed))


def _reason(entry: Entry, now: Entry | None, after: ConsulSnapshot) -> RemovalReason:
    """Why an incarnation is gone, as far as the snapshot shows."""
    winner = after.winners.get(entry.record.key)
    is_replaced = now is not None or (winner is not None and winner.record.member.epoch > entry.record.member.epoch)
    address = entry.record.member.address
    if is_replaced or any(other.record.member.address == address for other in after.members.values()):
        return RemovalReason.REPLACED
    return RemovalReason.LEASE_EXPIRED


def _member(entry: Entry) -> Member:
    member = entry.record.member
    assert not isinstance(member, Replica), "registries are not part of the view"
    return member


def _newest_at_each_address(winners: Mapping[Key, Entry]) -> dict[str, Entry]:
    """Only one process can listen at an address: the one that was started last."""
    newest: dict[str, Entry] = {}
    for entry in winners.values():
        if entry.record.is_gone:
            continue
        rival = newest.get(entry.record.member.address)
        if rival is None or _age(entry) > _age(rival):
            newest[entry.record.member.address] = entry
    for entry in winners.values():
        newest.setdefault(entry.record.member.address, entry)
    return newest


def _age(entry: Entry) -> tuple[int, Key]:
    return entry.record.member.epoch, entry.record.key


def _is_visible(entry: Entry) -> bool:
    """A draining worker is listed until its lease ends although its check is critical: it reports NOT_SERVING on
    purpose.
    """
    record = entry.record
    if isinstance(record.member, Replica) or record.is_gone:
        return False
    return entry.health is not Health.CRITICAL or record.member.state is WorkerState.DRAINING
