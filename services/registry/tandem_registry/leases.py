"""Membership: the state machine that says which members (workers and frontends) are alive, and numbers each change.

Pure: the clock, the source of lease ids and the receiver of changes are given. Owns leases, epochs and revisions; knows
neither gRPC, nor watchers, nor when to look again (`next_expiry_s` tells whoever does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tandem.clock import Clock
from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import DuplicateWorker, StaleEpoch, WorkerNotFound
from tandem_registry.view import Change, Listed, RemovalReason, Removed, View

FRESH_FRACTION = 0.5
"""Of a lease's time. Signs of life come at every third of it: a holder that missed one may be dead."""
PAUSE_MIN_S = 0.1
"""An expiry seen later than this was seen by a process that did not run, and so could not hear signs of life either."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, and the revision of the view that first holds its member."""

    lease_id: str
    revision: int


@dataclass(frozen=True, slots=True)
class Rival:
    """A member with a lease that somebody else keeps, where it may stand in the way of a new one."""

    member: Member
    is_alive: bool
    """Whether there is a recent sign that it lives."""
    is_kept: bool = True
    """Whether its keeper is alive; else its own process may ask for the same lease anew."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease of this table, as those who write it down see it."""

    lease_id: str
    member: Member


@dataclass(slots=True)
class _Lease:
    lease_id: str
    member: Member
    renewed_s: float
    expires_s: float
    revision: int
    """Of the last change of this member's entry."""
    is_heard: bool = True
    """Whether a sign of life came here; not yet, right after it was taken over from another keeper."""
    is_extended: bool = False
    """Whether it outlives its time because this process was paused; at most once between two signs of life."""


class Membership:
    """All leases. Every method lets leases that are over expire first, so that nothing is decided by the dead."""

    def __init__(
        self,
        *,
        keeper: str,
        ttl_s: float,
        clock: Clock,
        new_lease_id: Callable[[], str],
        on_change: Callable[[Change], None],
    ) -> None:
        self.keeper = keeper
        """Names this table: whoever keeps its leases and counts its revisions."""
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
        """No lease is over before this time: spares looking at all of them at each call."""

    def register(self, member: Member, others: Iterable[Rival] = ()) -> Grant:
        """Enter one start of a member. It takes the place of older starts at its address, which cannot be alive, and of
        older starts of its id elsewhere that have missed a sign of life. `others` are rivals that this table has not.

        Raises:
            DuplicateWorker: a member holds the id or the address with an epoch that is not older, or the id at another
                address where it is alive. Metadata: worker, epoch and address (of the holder), field, lease_ttl_ms.
        """
        self.expire()
        own = {id(lease): lease for lease in self._in_the_way(member)}
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
        """Take over a lease that another keeper granted. Older starts of its id or at its address give way."""
        assert not self.holds(lease_id), "a lease that is held here would give way to itself"
        older = {id(lease): lease for lease in self._in_the_way(member)}
        for lease in older.values():
            self._forget(lease)
        self._enter(lease_id, member, is_heard=is_heard)
        replaced = tuple(Removed(lease.member, RemovalReason.REPLACED) for lease in older.values())
        self._change(upserted=(member,), removed=replaced)

    def give_up(self, lease_id: str) -> None:
        """Forget a lease that another keeper has taken over, or that was never written down; nothing is said of it."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._forget(lease)

    def held(self) -> tuple[Held, ...]:
        """All leases, those that are over included until `expire`."""
        return tuple(Held(lease.lease_id, lease.member) for lease in self._leases.values())

    def holds(self, lease_id: str) -> bool:
        """Whether this table has the lease, over or not."""
        return lease_id in self._leases

    def lease_of(self, kind: str, member_id: str) -> Held | None:
        """The lease of a member; None: this table has none."""
        lease = self._by_id.get((kind, member_id))
        return None if lease is None else Held(lease.lease_id, lease.member)

    def age_s(self, lease_id: str) -> float | None:
        """Time since the last sign of life; None: none came here, or there is no such lease."""
        lease = self._leases.get(lease_id)
        return None if lease is None or not lease.is_heard else self._clock() - lease.renewed_s

    def extend_if_alive(self, is_alive: Callable[[Held], bool]) -> None:
        """Let leases that were taken over and not heard of yet live on, for those who are known to live."""
        end_s = self._clock() + self.ttl_s
        for lease in self._leases.values():
            if not lease.is_heard and is_alive(Held(lease.lease_id, lease.member)):
                lease.expires_s = end_s

    def keep_alive(self, lease_id: str, state: WorkerState | None = None) -> None:
        """Hear a sign of life; the lease lives for its whole time from now on.

        Raises:
            WorkerNotFound: the lease is over.
        """
        lease = self._lease(lease_id)
        lease.renewed_s = self._clock()
        lease.expires_s = lease.renewed_s + self.ttl_s
        lease.is_extended, lease.is_heard = False, True
        if state is not None:
            self._set_state(lease, state)

    def drain(self, worker_id: str, epoch: int) -> int:
        """Mark a worker as draining. Returns the revision that first shows it.

        Raises:
            WorkerNotFound: no live worker has that id.
            StaleEpoch: another start of it is alive.
        """
        self.expire()
        lease = self._by_id.get((Worker.kind, worker_id))
        if lease is None:
            raise WorkerNotFound(f"no live worker is called {worker_id!r}", worker=worker_id)
        actual = lease.member.epoch
        if actual != epoch:
            problem = f"worker {worker_id} was started again: its epoch is {actual}, not {epoch}"
            raise StaleEpoch(problem, worker=worker_id, expected=epoch, actual=actual)
        self._set_state(lease, WorkerState.DRAINING)
        return lease.revision

    def deregister(self, lease_id: str) -> int:
        """Take a member out. Returns the revision that first lacks it.

        Raises:
            WorkerNotFound: the lease is over.
        """
        lease = self._lease(lease_id)
        self._forget(lease)
        self._change(removed=(Removed(lease.member, RemovalReason.DEREGISTERED),))
        return self.revision

    def view(self) -> View:
        """The view at this moment."""
        self.expire()
        now_s = self._clock()
        workers, frontends = [], []
        for _, lease in sorted(self._by_id.items()):
            age_s, member = now_s - lease.renewed_s, lease.member
            if isinstance(member, Frontend):
                frontends.append(Listed(member, age_s, self.keeper))
            else:
                workers.append(Listed(member, age_s, self.keeper))
        return View(self.keeper, self.revision, tuple(workers), tuple(frontends))

    def next_expiry_s(self) -> float | None:
        """When to call `expire` next; None while there is no lease."""
        return min((lease.expires_s for lease in self._leases.values()), default=None)

    def expire(self) -> None:
        """Take out the members whose leases are over: one change for all of them."""
        now_s = self._clock()
        if now_s < self._not_before_s:
            return
        self._extend_after_pause(now_s)
        over = [lease for lease in self._leases.values() if lease.expires_s <= now_s]
        for lease in over:
            self._forget(lease)
        if over:
            self._change(removed=tuple(Removed(lease.member, RemovalReason.LEASE_EXPIRED) for lease in over))
        next_s = self.next_expiry_s()
        self._not_before_s = now_s + self.ttl_s if next_s is None else next_s

    def _extend_after_pause(self, now_s: float) -> None:
        """A frozen or starved registry must not bury everybody when it wakes: signs of life wait in its sockets."""
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
            raise WorkerNotFound("that lease is over or was never granted: register again", lease=lease_id)
        return lease

    def _is_fresh(self, lease: _Lease) -> bool:
        return self._clock() - lease.renewed_s <= self.ttl_s * FRESH_FRACTION

    def _in_the_way(self, member: Member) -> list[_Lease]:
        found = (self._by_address.get(member.address), self._by_id.get((member.kind, member.member_id)))
        return [lease for lease in found if lease is not None]

    def _check_rival(self, member: Member, rival: Rival) -> None:
        is_elsewhere = rival.member.address != member.address
        is_same_start = not is_elsewhere and _start(rival.member) == _start(member)
        if is_same_start and not rival.is_kept:
            return
        # A frontend with a worker's address is a mistake, not its next start.
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
        held = member.address if field == "address" else member.member_id
        who = f"{holder.kind} {holder.member_id} of epoch {holder.epoch} at {holder.address}"
        why = "which is alive" if holder.epoch < member.epoch else f"which is not older than epoch {member.epoch}"
        return DuplicateWorker(
            f"{field} {held} is held by {who}, {why}",
            worker=holder.member_id,
            epoch=holder.epoch,
            address=holder.address,
            field=field,
            lease_ttl_ms=int(self.ttl_s * 1_000),
        )

    def _set_state(self, lease: _Lease, state: WorkerState) -> None:
        if lease.member.state is not state:
            lease.member = replace(lease.member, state=state)
            lease.revision = self.revision + 1
            self._change(upserted=(lease.member,))

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
    """In which field a rival stands in the way."""
    has_same_id = (rival.kind, rival.member_id) == (member.kind, member.member_id)
    return f"{member.kind}_id" if has_same_id else "address"
