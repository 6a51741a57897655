"""The leases that this replica owns, compared with what Consul shows.

Owns adoption, handover, expiry and orphans; the lease rules are in `tandem_registry.leases` only. Awaits nothing: it
sets the desired entries (`reconciler`), and returns which orphans of dead replicas must be removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from tandem.clock import Clock
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Member
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import StaleEpoch, WorkerNotFound
from tandem_registry.backends.consul.reconciler import SETTLE_S, Reconciler, Urgency
from tandem_registry.backends.consul.records import Record, Replica, service_id
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Entry, Key
from tandem_registry.leases import Grant, Held, Membership, Rival
from tandem_registry.view import Change, Health, RemovalReason

log = logging.getLogger(__name__)

Start = tuple[str, str, int]
"""Kind, id and epoch."""


@dataclass(frozen=True, slots=True)
class Orphan:
    """An entry of a dead replica that is no longer needed."""

    node: str
    service_id: str
    is_only_one: bool
    """Whether no other agent has an entry with that id, so that it can be removed at this replica's agent too."""


class LeaseManager:
    """This replica's leases, reconciled with what Consul shows."""

    def __init__(
        self,
        *,
        replica_id: str,
        service: str,
        ttl_s: float,
        clock: Clock,
        reconciler: Reconciler,
        new_lease_id: Callable[[], str],
    ) -> None:
        self.replica_id = replica_id
        self.observed = ConsulSnapshot()
        """The last snapshot of Consul."""
        self.membership = Membership(
            owner=replica_id, ttl_s=ttl_s, clock=clock, new_lease_id=new_lease_id, on_change=self._write
        )
        self.reasons: dict[Start, RemovalReason] = {}
        """Removal reasons of incarnations whose leases this replica owned, until the view has been published."""
        self._service = service
        self._clock = clock
        self._reconciler = reconciler
        self._terms: dict[str, int] = {}
        self._is_incomplete = False
        """Whether Consul lacked an entry whose write may still be propagating."""
        self._absent: dict[str, float] = {}
        """Replicas that own entries but are not alive, and since when."""
        self._replaced: dict[str, float] = {}
        """Service ids that are removed once their replacement is visible, and since when."""

    def register(self, member: Member) -> tuple[Grant, str]:
        """Grant a lease; returns it and its service id, whose write is queued. Raises as `Membership.register`."""
        grant = self.membership.register(member, self._rivals(member))
        return grant, service_id(self._service, self._record(Held(grant.lease_id, member)))

    def keep_alive(self, lease_id: str, state: WorkerState | None, adapters: tuple[Adapter, ...] | None = None) -> None:
        """Renew a lease; adopts it where another replica owns it.

        Raises:
            WorkerNotFound: neither this replica nor Consul knows that lease.
        """
        try:
            self.membership.keep_alive(lease_id, state, adapters)
        except WorkerNotFound:
            if not self._adopt_lease(lease_id):
                raise
            self.membership.keep_alive(lease_id, state, adapters)

    def drain(self, worker_id: str, epoch: int) -> None:
        """Mark a worker as draining; adopts its lease where another replica owns it. Raises as `Membership.drain`."""
        entry = self.observed.winners.get((Worker.kind, worker_id))
        is_foreign = self.membership.lease_of(Worker.kind, worker_id) is None and entry is not None
        if is_foreign and entry is not None and not entry.record.is_gone and entry.record.owner != self.replica_id:
            actual = entry.record.member.epoch
            if actual != epoch:
                problem = f"worker {worker_id} has restarted: its epoch is {actual}, not {epoch}"
                raise StaleEpoch(problem, worker=worker_id, expected=epoch, actual=actual)
            self._adopt(entry, is_heard=False)
        self.membership.drain(worker_id, epoch)

    def deregister(self, lease_id: str) -> Member:
        """End a lease of any replica; returns its member. Raises as `Membership.deregister`."""
        member = next((held.member for held in self.membership.held() if held.lease_id == lease_id), None)
        if member is None and self._adopt_lease(lease_id):
            member = next(held.member for held in self.membership.held() if held.lease_id == lease_id)
        self.membership.deregister(lease_id)
        assert member is not None
        return member

    def give_up(self, lease_id: str, entry_id: str) -> None:
        """Drop a lease that could not be written to Consul."""
        self.membership.give_up(lease_id)
        self._terms.pop(lease_id, None)
        self._reconciler.want(entry_id, None)

    def sweep(self, *, is_live: bool) -> None:
        """Expire leases that are due. Adopted leases without a keep-alive so far are renewed as long as Consul's checks
        pass, and while Consul is unreachable: then nothing shows that the member is dead.
        """
        if is_live and self._is_incomplete:
            self._compare_all(self._own_entries())
        self.membership.extend_if_alive(lambda held: not is_live or self._passes(held))
        self.membership.expire()

    def ages_s(self) -> dict[str, float | None]:
        """Time since the last keep-alive of each lease that this replica owns."""
        return {held.lease_id: self.membership.age_s(held.lease_id) for held in self.membership.held()}

    def own_keys(self) -> set[Key]:
        """Members whose leases this replica owns."""
        return {(held.member.kind, held.member.member_id) for held in self.membership.held()}

    def explains(self, observed: ConsulSnapshot) -> bool:
        """Whether this replica has removed all members of a snapshot."""
        return all((*key, entry.record.member.epoch) in self.reasons for key, entry in observed.members.items())

    def forget_reasons(self) -> None:
        """Drop reasons after publication; those of incarnations that Consul still shows will be needed again."""
        shown = {(*key, entry.record.member.epoch) for key, entry in self.observed.members.items()}
        self.reasons = {start: reason for start, reason in self.reasons.items() if start in shown}

    def take(self, observed: ConsulSnapshot) -> None:
        """Reconcile this replica's leases with a new snapshot."""
        self.observed = observed
        own = self._own_entries()
        self._compare_all(own)
        self._remove_unwanted(own)
        absent = {entry.record.owner for entry in observed.entries} - observed.replicas - {self.replica_id}
        now_s = self._clock()
        self._absent = {owner: self._absent.get(owner, now_s) for owner in absent}

    def adopt(self) -> list[Orphan]:
        """Adopt the leases of dead replicas, and return their entries that must be removed. Only the live replica with
        the lowest id does this, so that two never adopt the same lease.

        A replica is dead when it was absent for a lease's time to live. Live members have reconnected elsewhere by
        then.
        """
        dead = {owner for owner in self._absent if self._is_dead(owner)}
        if not dead or min(self.observed.replicas, default="") != self.replica_id:
            return []
        return self._adopt_orphan(dead)

    def _is_dead(self, owner: str) -> bool:
        return self._clock() - self._absent.get(owner, self._clock()) >= self.membership.ttl_s

    def _own_entries(self) -> dict[str, Entry]:
        return {entry.service_id: entry for entry in self.observed.entries if entry.record.owner == self.replica_id}

    def _compare_all(self, own: dict[str, Entry]) -> None:
        self._is_incomplete = False
        for held in self.membership.held():
            self._compare(held, own)

    def _compare(self, held: Held, own: dict[str, Entry]) -> None:
        record = self._record(held)
        entry_id = service_id(self._service, record)
        winner = self.observed.winners.get(record.key)
        if winner is not None and winner.record.owner != self.replica_id and winner.record.rank > record.rank:
            log.info("lease of %s %s was adopted by registry %s", *record.key, winner.record.owner)
            self.membership.give_up(held.lease_id)
            self._terms.pop(held.lease_id, None)
            if entry_id in own:
                self._reconciler.want(entry_id, None)
            else:
                self._reconciler.disown(entry_id)
        elif entry_id not in own:
            self._is_incomplete = self._reconciler.rewrite_missing(entry_id) or self._is_incomplete

    def _remove_unwanted(self, own: dict[str, Entry]) -> None:
        """Remove entries of this replica that have no lease."""
        now_s = self._clock()
        for entry_id, since_s in list(self._replaced.items()):
            entry = own.get(entry_id)
            is_seen = entry is not None and self.observed.members.get(entry.record.key) is entry
            if not is_seen or now_s - since_s > SETTLE_S:
                del self._replaced[entry_id]
                self._reconciler.want(entry_id, None)
        for entry_id in own:
            wanted = self._reconciler.wanted(entry_id)
            if wanted is None:
                is_useless = entry_id not in self._replaced and not self._reconciler.is_ending(entry_id)
            else:
                is_useless = wanted.is_gone and not self._others(wanted.key)
            if is_useless:
                self._reconciler.want(entry_id, None)

    def own_stale_entries(self) -> list[Orphan]:
        """Entries of previous registry processes at this one's address. The entry of a killed one would pass its health
        check for ever, because this process now listens at the address that is checked.
        """
        replicas = [entry for entry in self.observed.entries if isinstance(entry.record.member, Replica)]
        addresses = {entry.record.member.address for entry in replicas if entry.record.owner == self.replica_id}
        return [
            Orphan(entry.node, entry.service_id, is_only_one=True)
            for entry in replicas
            if entry.record.member.address in addresses and entry.record.owner != self.replica_id
        ]

    def _adopt_orphan(self, dead: set[str]) -> list[Orphan]:
        orphans = []
        names = [entry.service_id for entry in self.observed.entries]
        for entry in self.observed.entries:
            record = entry.record
            if record.owner not in dead or isinstance(record.member, Replica):
                continue
            if self.observed.winners[record.key] is entry and not record.is_gone:
                # Until its own entry is visible, Consul may show this replica the dead one's entry again.
                if not self.membership.holds(record.lease_id):
                    self._adopt(entry, is_heard=False)
            elif len(self._others(record.key)) == 1 or not record.is_gone:
                orphans.append(Orphan(entry.node, entry.service_id, names.count(entry.service_id) == 1))
        return orphans

    def _adopt_lease(self, lease_id: str) -> bool:
        entry = self.observed.by_lease.get(lease_id)
        if entry is None or entry.record.owner == self.replica_id:
            # This replica has ended that lease itself, and Consul does not show it yet.
            return False
        self._adopt(entry, is_heard=True)
        return True

    def _adopt(self, entry: Entry, *, is_heard: bool) -> None:
        record = entry.record
        assert not isinstance(record.member, Replica)
        log.info("adopted the lease of %s %s from registry %s", *record.key, record.owner)
        self._terms[record.lease_id] = record.term + 1
        self.membership.adopt(record.lease_id, record.member, is_heard=is_heard)

    def _write(self, change: Change) -> None:
        """Set the desired entries after a change to this replica's leases."""
        for member in change.upserted:
            held = self.membership.lease_of(member.kind, member.member_id)
            assert held is not None
            record = self._record(held)
            entry_id = service_id(self._service, record)
            self._replaced.pop(entry_id, None)
            self._reconciler.want(entry_id, record, self._health(record.key), self._urgency(record))
        for removed in change.removed:
            member = removed.member
            self.reasons[(member.kind, member.member_id, member.epoch)] = removed.reason
            self._end(member, removed.reason)

    def _urgency(self, record: Record) -> Urgency:
        entry = self.observed.winners.get(record.key)
        if entry is None or entry.record.member.epoch != record.member.epoch:
            return Urgency.AWAITED
        return Urgency.UNSEEN if entry.record.member == record.member else Urgency.SEEN

    def _end(self, member: Member, reason: RemovalReason) -> None:
        entry_id = service_id(self._service, Record(member=member, owner=self.replica_id))
        record = self._reconciler.wanted(entry_id)
        if record is None:
            return
        self._terms.pop(record.lease_id, None)
        if reason is RemovalReason.REPLACED:
            self._replaced[entry_id] = self._clock()
        elif self._others(record.key):
            # Removing this entry would make an older one at another agent the winner again: write a tombstone instead.
            gone = Record(
                member=member, lease_id=record.lease_id, owner=self.replica_id, term=record.term + 1, is_gone=True
            )
            self._reconciler.want(entry_id, gone)
        else:
            self._reconciler.want(entry_id, None)

    def _rivals(self, member: Member) -> list[Rival]:
        """Members that conflict with a registration and whose leases other replicas own."""
        key = (member.kind, member.member_id)
        found = []
        for entry in self.observed.winners.values():
            other = entry.record.member
            is_rival = entry.record.key == key or other.address == member.address
            is_own = entry.record.owner == self.replica_id
            if is_rival and not is_own and not entry.record.is_gone and not isinstance(other, Replica):
                is_kept = not self._is_dead(entry.record.owner)
                found.append(Rival(other, self._is_alive(entry, is_kept=is_kept), is_kept))
        return found

    def _is_alive(self, entry: Entry, *, is_kept: bool) -> bool:
        """Whether a member that sends its keep-alives to another replica is alive, as far as Consul shows."""
        member = entry.record.member
        if not isinstance(member, Replica) and member.state is WorkerState.DRAINING:
            return is_kept
        return entry.health is Health.PASSING or (entry.health is Health.UNKNOWN and is_kept)

    def _others(self, key: Key) -> list[Entry]:
        """Entries of a member that other replicas own."""
        return [
            entry
            for entry in self.observed.entries
            if entry.record.key == key and entry.record.owner != self.replica_id
        ]

    def _passes(self, held: Held) -> bool:
        return self._health((held.member.kind, held.member.member_id), default=Health.UNKNOWN) is Health.PASSING

    def _health(self, key: Key, default: Health = Health.PASSING) -> Health:
        entry = self.observed.winners.get(key)
        return default if entry is None else entry.health

    def _record(self, held: Held) -> Record:
        return Record(
            member=held.member,
            lease_id=held.lease_id,
            owner=self.replica_id,
            term=self._terms.get(held.lease_id, 1),
        )
