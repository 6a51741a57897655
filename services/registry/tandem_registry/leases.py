"""Membership: the state machine that decides which members (workers and frontends) are alive, and numbers each change.

Pure: the clock, the source of lease ids and the receiver of changes are passed in. Owns leases, epochs and revisions;
knows neither gRPC nor watchers, and has no timer: the caller calls `expire` at `next_expiry_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tandem.clock import Clock
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import DuplicateWorker, StaleEpoch, WorkerNotFound
from tandem_registry.view import Change, Listed, RemovalReason, Removed, View

FRESH_FRACTION = 0.5
"""Of a lease's time to live. Keep-alives come at every third of it: a member that missed one may be dead."""
PAUSE_MIN_S = 0.1
"""An expiry that is processed later than this means that this process was paused, and read no keep-alives meanwhile."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, and the first revision of the view that contains its member."""

    lease_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class Rival:
    """A member whose lease another replica owns, and whose id or address conflicts with a registration."""

    member: Member
    is_alive: bool
    """Whether a recent keep-alive or health check shows that it is running."""
    is_kept: bool = True
    """Whether the replica that owns its lease is alive; else the same process may register the same epoch again."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease of this table, as seen by the code that persists it."""

    lease_id: str
    member: Member


@dataclass(slots=True)
class _Lease:
    lease_id: str
    member: Member
    renewed_s: float
    expires_s: float
    revision: int
    """Of the last change to this member's entry."""
    is_heard: bool = True
    """Whether a keep-alive arrived at this replica; false right after the lease was adopted from another one."""
    is_extended: bool = False
    """Whether it was extended because this process was paused; at most once between two keep-alives."""


class Membership:
    """All leases. Every method first expires the due ones, so that a dead member never decides a conflict."""

    def __init__(
        self,
        *,
        owner: str,
        ttl_s: float,
        clock: Clock,
        new_lease_id: Callable[[], str],
        on_change: Callable[[Change], None],
    ) -> None:
        self.owner = owner
        """Id of the replica that owns this table's leases and numbers its revisions."""
        self.ttl_s = ttl_s
        self.revision = 0
        self._clock = clock
        self._new_lease_id = new_lease_id
        self._on_change = on_change
        self._leases: dict[str, _Lease] = {}
        self._by_id: dict[tuple[str, str], _Lease] = {}
        """By kind and id."""
        self._by_address: dict[str, _Lease] = {}
        self._not_before_s = 0.0
        """No lease expires before this time: saves a scan of all leases at each call."""

    def register(self, member: Member, others: Iterable[Rival] = ()) -> Grant:
        """Register one incarnation of a member. It replaces older incarnations at its address, which cannot be alive
        because only one process can listen there, and older incarnations of its id elsewhere that have missed a
        keep-alive. `others` are rivals whose leases are not in this table.

        Raises:
            DuplicateWorker: a member holds the id or the address with an epoch that is not older, or the id at another
                address where it is alive. Metadata: worker, epoch and address (of the conflicting member), field,
                lease_ttl_ms.
        """
        self.expire()
        own = {id(lease): lease for lease in self._conflicting(member)}
        for lease in own.values():
            self._check_rival(member, Rival(lease.member, self._is_fresh(lease), lease.is_heard))
        for rival in others:
            self._check_rival(member, rival)
        for lease in own.values():
            self._forget(lease)
        replaced = tuple(Removed(lease.member, RemovalReason.REPLACED) for lease in own.values())
        lease = self._enter(self._new_lease_id(), member, is_heard=True)
        self._change(upserted=(member,), removed=replaced)
        return Grant(lease.lease_id, self.revision)

    def adopt(self, lease_id: str, member: Member, *, is_heard: bool) -> None:
        """Add a lease that another replica granted. It replaces older incarnations with its id or at its address."""
        assert not self.holds(lease_id), "a lease that is in this table would replace itself"
        older = {id(lease): lease for lease in self._conflicting(member)}
        for lease in older.values():
            self._forget(lease)
        self._enter(lease_id, member, is_heard=is_heard)
        replaced = tuple(Removed(lease.member, RemovalReason.REPLACED) for lease in older.values())
        self._change(upserted=(member,), removed=replaced)

    def give_up(self, lease_id: str) -> None:
        """Drop a lease that another replica has adopted, or that was never persisted; reports no change."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._forget(lease)

    def held(self) -> tuple[Held, ...]:
        """All leases, including those that are due but not expired yet."""
        return tuple(Held(lease.lease_id, lease.member) for lease in self._leases.values())

    def holds(self, lease_id: str) -> bool:
        """Whether this table has the lease, due or not."""
        return lease_id in self._leases

    def lease_of(self, kind: str, member_id: str) -> Held | None:
        """The lease of a member; None: not in this table."""
        lease = self._by_id.get((kind, member_id))
        return None if lease is None else Held(lease.lease_id, lease.member)

    def age_s(self, lease_id: str) -> float | None:
        """Time since the last keep-alive; None: none arrived here, or there is no such lease."""
        lease = self._leases.get(lease_id)
        return None if lease is None or not lease.is_heard else self._clock() - lease.renewed_s

    def extend_if_alive(self, is_alive: Callable[[Held], bool]) -> None:
        """Renew adopted leases without a keep-alive so far, where `is_alive` says that the member is running."""
        end_s = self._clock() + self.ttl_s
        for lease in self._leases.values():
            if not lease.is_heard and is_alive(Held(lease.lease_id, lease.member)):
                lease.expires_s = end_s

    def keep_alive(
        self, lease_id: str, state: WorkerState | None = None, adapters: tuple[Adapter, ...] | None = None
    ) -> None:
        """Renew a lease for its whole time to live; None: that of the member is unchanged.

        Raises:
            WorkerNotFound: the lease has expired.
        """
        lease = self._lease(lease_id)
        lease.renewed_s = self._clock()
        lease.expires_s = lease.renewed_s + self.ttl_s
        lease.is_extended, lease.is_heard = False, True
        if state is not None:
            self._set_state(lease, state)
        if adapters is not None and isinstance(lease.member, Worker) and adapters != lease.member.adapters:
            self._replace(lease, replace(lease.member, adapters=adapters))

    def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining. Returns the revision that first shows it.

        Raises:
            WorkerNotFound: no live worker has that id.
            StaleEpoch: another incarnation of it is alive.
        """
        self.expire()
        lease = self._by_id.get((Worker.kind, worker_id))
        if lease is None:
            raise WorkerNotFound(f"no live worker has the id {worker_id!r}", worker=worker_id)
        actual = lease.member.epoch
        if actual != epoch:
            problem = f"worker {worker_id} has restarted: its epoch is {actual}, not {epoch}"
            raise StaleEpoch(problem, worker=worker_id, expected=epoch, actual=actual)
        self._set_state(lease, WorkerState.DRAINING)
        return lease.revision

    def deregister(self, lease_id: str) -> int:
        """Remove a member. Returns the first revision without it.

        Raises:
            WorkerNotFound: the lease has expired.
        """
        lease = self._lease(lease_id)
        self._forget(lease)
        self._change(removed=(Removed(lease.member, RemovalReason.DEREGISTERED),))
        return self.revision

    def view(self) -> View:
        """The current view."""
        self.expire()
        now_s = self._clock()
        workers, frontends = [], []
        for _, lease in sorted(self._by_id.items()):
            age_s, member = now_s - lease.renewed_s, lease.member
            if isinstance(member, Frontend):
                frontends.append(Listed(member, age_s, self.owner))
            else:
                workers.append(Listed(member, age_s, self.owner))
        return View(self.owner, self.revision, tuple(workers), tuple(frontends))

    def next_expiry_s(self) -> float | None:
        """When to call `expire` next; None while there is no lease."""
        return min((lease.expires_s for lease in self._leases.values()), default=None)

    def expire(self) -> None:
        """Remove the members whose leases are due: one change for all of them."""
        now_s = self._clock()
        if now_s < self._not_before_s:
            return
        self._extend_after_pause(now_s)
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        for lease in expired:
            self._forget(lease)
        if expired:
            self._change(removed=tuple(Removed(lease.member, RemovalReason.LEASE_EXPIRED) for lease in expired))
        next_s = self.next_expiry_s()
        self._not_before_s = now_s + self.ttl_s if next_s is None else next_s

    def _extend_after_pause(self, now_s: float) -> None:
        """After a pause of this process, keep-alives are still unread in its sockets: extend leases by half a time to
        live instead of expiring all of them.
        """
        first_s = self.next_expiry_s()
        if first_s is None or now_s - first_s <= PAUSE_MIN_S:
            return
        until_s = now_s + self.ttl_s / 2
        for lease in self._leases.values():
            if lease.expires_s < until_s and not lease.is_extended:
                lease.expires_s, lease.is_extended = until_s, True

    def _lease(self, lease_id: str) -> _Lease:
        self.expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            raise WorkerNotFound("unknown or expired lease: register again", lease=lease_id)
        return lease

    def _is_fresh(self, lease: _Lease) -> bool:
        return self._clock() - lease.renewed_s <= self.ttl_s * FRESH_FRACTION

    def _conflicting(self, member: Member) -> list[_Lease]:
        found = (self._by_address.get(member.address), self._by_id.get((member.kind, member.member_id)))
        return [lease for lease in found if lease is not None]

    def _check_rival(self, member: Member, rival: Rival) -> None:
        is_elsewhere = rival.member.address != member.address
        is_same_start = not is_elsewhere and _start(rival.member) == _start(member)
        if is_same_start and not rival.is_kept:
            return
        # A frontend at a worker's address is a configuration error, not a restart of that worker.
        is_another_kind = rival.member.kind != member.kind
        if rival.member.epoch >= member.epoch or ((is_elsewhere or is_another_kind) and rival.is_alive):
            raise self._duplicate(_field(member, rival.member), member, rival.member)

    def _enter(self, lease_id: str, member: Member, *, is_heard: bool) -> _Lease:
        now_s = self._clock()
        lease = _Lease(lease_id, member, now_s, now_s + self.ttl_s, self.revision + 1, is_heard)
        self._leases[lease_id] = lease
        self._by_id[(member.kind, member.member_id)] = lease
        self._by_address[member.address] = lease
        self._not_before_s = min(self._not_before_s, lease.expires_s)
        return lease

    def _duplicate(self, field: str, member: Member, holder: Member) -> DuplicateWorker:
        value = member.address if field == "address" else member.member_id
        other = f"{holder.kind} {holder.member_id} (epoch {holder.epoch}, at {holder.address})"
        reason = "which is alive" if holder.epoch < member.epoch else f"which is not older than epoch {member.epoch}"
        # Private networks repeat: each Docker host has a bridge at 172.17.0.1.
        advice = "; if the two run on different hosts, set advertise_host of both" if field == "address" else ""
        return DuplicateWorker(
            f"{field} {value} is already registered by {other}, {reason}{advice}",
            worker=holder.member_id,
            epoch=holder.epoch,
            address=holder.address,
            field=field,
            lease_ttl_ms=int(self.ttl_s * 1_000),
        )

    def _set_state(self, lease: _Lease, state: WorkerState) -> None:
        if lease.member.state is not state:
            self._replace(lease, replace(lease.member, state=state))

    def _replace(self, lease: _Lease, member: Member) -> None:
        """Another description of the same incarnation."""
        lease.member = member
        lease.revision = self.revision + 1
        self._change(upserted=(member,))

    def _forget(self, lease: _Lease) -> None:
        del self._leases[lease.lease_id]
        del self._by_id[(lease.member.kind, lease.member.member_id)]
        del self._by_address[lease.member.address]

    def _change(self, *, upserted: tuple[Member, ...] = (), removed: tuple[Removed, ...] = ()) -> None:
        self.revision += 1
        self._on_change(Change(revision=self.revision, upserted=upserted, removed=removed))


def _start(member: Member) -> tuple[str, str, int]:
    return member.kind, member.member_id, member.epoch


def _field(member: Member, rival: Member) -> str:
    """The field in which a member conflicts with a rival."""
    has_same_id = (rival.kind, rival.member_id) == (member.kind, member.member_id)
    return f"{member.kind}_id" if has_same_id else "address"
