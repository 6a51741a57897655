"""Membership against a simple model, over random histories: revisions, replay, exact expiry, fencing by epoch."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tandem_registry.leases import Membership
from tandem_registry.view import Change, RemovalReason

from tandem.clock import ManualClock
from tandem.discovery.view import WorkerView
from tandem.domain.frontend import Member
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import DuplicateWorker, StaleEpoch, WorkerNotFound
from tests.unit.support.examples import examples
from tests.unit.support.registry_workers import make_frontend, make_worker, members_of

TTL_S = 8.0
KEYS = st.tuples(st.sampled_from(["worker", "frontend"]), st.sampled_from(["a", "b", "c"]))
ADDRESSES = st.sampled_from(["h:1", "h:2", "h:3"])
EPOCHS = st.integers(1, 6)
STATES = st.sampled_from([None, *WorkerState])


Key = tuple[str, str]


def key_of(member: Member) -> Key:
    return member.kind, member.member_id


class MembershipMachine(RuleBasedStateMachine):
    """`alive` is the model: kind and id -> (member, lease id, end of its lease)."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.changes: list[Change] = []
        self.lease_ids = (f"lease-{number}" for number in itertools.count())
        self.membership = Membership(
            owner="r",
            ttl_s=TTL_S,
            clock=self.clock,
            new_lease_id=self.lease_ids.__next__,
            on_change=self.changes.append,
        )
        self.alive: dict[Key, tuple[Member, str, float]] = {}
        self.ended: list[str] = []
        self.replayed: list[WorkerView] = []

    def end(self, key: Key) -> None:
        self.ended.append(self.alive.pop(key)[1])

    def listed(self, key: Key) -> Member:
        return next(member for member in members_of(self.membership.view()) if key_of(member) == key)

    def is_alive_elsewhere(self, holder: Member, kind: str, address: str) -> bool:
        """Elsewhere, or at the same address as a member of another kind: then it is not that one's former start."""
        end_s = self.alive[key_of(holder)][2]
        return (holder.address != address or holder.kind != kind) and end_s - self.clock() >= TTL_S / 2

    @rule(key=KEYS, epoch=EPOCHS, address=ADDRESSES)
    def register(self, key: Key, epoch: int, address: str) -> None:
        kind, member_id = key
        member = (make_worker if kind == "worker" else make_frontend)(member_id, epoch, address)
        rivals = [m for m, _, _ in self.alive.values() if key_of(m) == key or m.address == address]
        try:
            grant = self.membership.register(member)
        except DuplicateWorker as refusal:
            held = (refusal.metadata["worker"], refusal.metadata["address"])
            holder = next(m for m in rivals if (m.member_id, m.address) == held)
            assert holder.epoch >= epoch or self.is_alive_elsewhere(holder, kind, address)
            return
        assert all(rival.epoch < epoch for rival in rivals), "an older or equal start fenced a newer one"
        assert not any(self.is_alive_elsewhere(rival, kind, address) for rival in rivals), "a live start was fenced"
        for rival in rivals:
            self.end(key_of(rival))
        self.alive[key] = (member, grant.lease_id, self.clock() + TTL_S)
        assert grant.revision == self.membership.revision

    @rule(key=KEYS, state=STATES)
    def keep_alive(self, key: Key, state: WorkerState | None) -> None:
        if key not in self.alive:
            return
        member, lease_id, _ = self.alive[key]
        self.membership.keep_alive(lease_id, state)
        kept = self.listed(key)
        assert kept.state is (state or member.state)
        self.alive[key] = (kept, lease_id, self.clock() + TTL_S)

    @rule(data=st.data())
    def use_a_lease_that_is_over(self, data: st.DataObject) -> None:
        if not self.ended:
            return
        lease_id = data.draw(st.sampled_from(self.ended))
        for call in (self.membership.keep_alive, self.membership.deregister):
            try:
                call(lease_id)
            except WorkerNotFound:
                continue
            raise AssertionError("a lease that was over was taken")

    @rule(key=KEYS, epoch=EPOCHS)
    def drain(self, key: Key, epoch: int) -> None:
        key = ("worker", key[1])
        holder = self.alive.get(key)
        try:
            revision = self.membership.drain(key[1], epoch)
        except WorkerNotFound:
            assert holder is None
        except StaleEpoch:
            assert holder is not None
            assert holder[0].epoch != epoch
        else:
            assert holder is not None
            assert holder[0].epoch == epoch
            assert revision <= self.membership.revision
            drained = self.listed(key)
            assert drained.state is WorkerState.DRAINING
            self.alive[key] = (drained, *holder[1:])

    @rule(key=KEYS)
    def deregister(self, key: Key) -> None:
        if key in self.alive:
            assert self.membership.deregister(self.alive[key][1]) == self.membership.revision
            self.end(key)

    @rule(seconds=st.integers(1, 10))
    def pass_time(self, seconds: int) -> None:
        """As the sweep does it: stop at each expiry."""
        end_s = self.clock() + seconds
        while (next_s := self.membership.next_expiry_s()) is not None and next_s <= end_s:
            self.clock.now_s = next_s
            self.membership.expire()
            over = {key for key, (_, _, lease_end_s) in self.alive.items() if lease_end_s <= next_s}
            assert over == {key_of(gone.member) for gone in self.changes[-1].removed}
            assert {gone.reason for gone in self.changes[-1].removed} == {RemovalReason.LEASE_EXPIRED}
            for key in over:
                self.end(key)
        self.clock.now_s = end_s

    @rule()
    def begin_to_watch(self) -> None:
        view = self.membership.view()
        watcher = WorkerView(self.clock)
        watcher.apply_snapshot("r", view.revision, [entry.member for entry in view.workers])
        self.replayed.append(watcher)

    @invariant()
    def revisions_are_contiguous(self) -> None:
        assert [change.revision for change in self.changes] == list(range(1, self.membership.revision + 1))
        assert all(change.upserted or change.removed for change in self.changes)

    @invariant()
    def the_view_is_the_models(self) -> None:
        view = self.membership.view()
        members = members_of(view)
        assert members == [
            self.alive[key][0] for key in sorted(self.alive, key=lambda key: (key[0] == "frontend", key))
        ]
        addresses = [member.address for member in members]
        assert len(set(addresses)) == len(addresses)

    @invariant()
    def every_watcher_sees_the_same(self) -> None:
        expected = tuple(entry.member for entry in self.membership.view().workers)
        for watcher in self.replayed:
            for change in self.changes[watcher.revision :]:
                gone = [removed.member for removed in change.removed]
                removed = [(member.member_id, member.epoch) for member in gone if isinstance(member, Worker)]
                upserted = [member for member in change.upserted if isinstance(member, Worker)]
                watcher.apply_delta("r", change.revision - 1, change.revision, upserted, removed)
            assert watcher.members() == expected


TestMembershipMachine = MembershipMachine.TestCase
TestMembershipMachine.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
