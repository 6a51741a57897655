"""Membership against a simple model, over random histories: revisions, replay, exact expiry, fencing by epoch."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from registry_workers import make_worker
from tandem_registry.membership import Change, Membership, RemovalReason

from tandem.errors import DuplicateWorker, StaleEpoch, WorkerNotFound
from tandem.model.worker import Worker, WorkerState
from tandem.rpc.registry_view import RegistryView
from tandem.runtime.clock import ManualClock

TTL_S = 8.0
WORKER_IDS = st.sampled_from(["a", "b", "c"])
ADDRESSES = st.sampled_from(["h:1", "h:2", "h:3"])
EPOCHS = st.integers(1, 6)
STATES = st.sampled_from([None, *WorkerState])


class MembershipMachine(RuleBasedStateMachine):
    """`alive` is the model: worker id -> (worker, lease id, end of its lease)."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.changes: list[Change] = []
        self.lease_ids = (f"lease-{number}" for number in itertools.count())
        self.membership = Membership(
            ttl_s=TTL_S, clock=self.clock, new_lease_id=self.lease_ids.__next__, on_change=self.changes.append
        )
        self.alive: dict[str, tuple[Worker, str, float]] = {}
        self.ended: list[str] = []
        self.replayed: list[RegistryView] = []

    def end(self, worker_id: str) -> None:
        self.ended.append(self.alive.pop(worker_id)[1])

    def is_alive_elsewhere(self, holder: Worker, address: str) -> bool:
        end_s = self.alive[holder.worker_id][2]
        return holder.address != address and end_s - self.clock() >= TTL_S / 2

    @rule(worker_id=WORKER_IDS, epoch=EPOCHS, address=ADDRESSES)
    def register(self, worker_id: str, epoch: int, address: str) -> None:
        worker = make_worker(worker_id, epoch, address)
        rivals = [w for w, _, _ in self.alive.values() if w.worker_id == worker_id or w.address == address]
        try:
            grant = self.membership.register(worker)
        except DuplicateWorker as refusal:
            holder = self.alive[refusal.metadata["worker"]][0]
            assert holder in rivals
            assert holder.epoch >= epoch or self.is_alive_elsewhere(holder, address)
            return
        assert all(rival.epoch < epoch for rival in rivals), "an older or equal start fenced a newer one"
        assert not any(self.is_alive_elsewhere(rival, address) for rival in rivals), "a live start was fenced"
        for rival in rivals:
            self.end(rival.worker_id)
        self.alive[worker_id] = (worker, grant.lease_id, self.clock() + TTL_S)
        assert grant.revision == self.membership.revision

    @rule(worker_id=WORKER_IDS, state=STATES)
    def keep_alive(self, worker_id: str, state: WorkerState | None) -> None:
        if worker_id not in self.alive:
            return
        worker, lease_id, _ = self.alive[worker_id]
        self.membership.keep_alive(lease_id, state)
        kept = next(e.worker for e in self.membership.view().entries if e.worker.worker_id == worker_id)
        assert kept.state is (state or worker.state)
        self.alive[worker_id] = (kept, lease_id, self.clock() + TTL_S)

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

    @rule(worker_id=WORKER_IDS, epoch=EPOCHS)
    def drain(self, worker_id: str, epoch: int) -> None:
        holder = self.alive.get(worker_id)
        try:
            revision = self.membership.drain(worker_id, epoch)
        except WorkerNotFound:
            assert holder is None
        except StaleEpoch:
            assert holder is not None
            assert holder[0].epoch != epoch
        else:
            assert holder is not None
            assert holder[0].epoch == epoch
            assert revision <= self.membership.revision
            drained = next(e.worker for e in self.membership.view().entries if e.worker.worker_id == worker_id)
            assert drained.state is WorkerState.DRAINING
            self.alive[worker_id] = (drained, *holder[1:])

    @rule(worker_id=WORKER_IDS)
    def deregister(self, worker_id: str) -> None:
        if worker_id in self.alive:
            assert self.membership.deregister(self.alive[worker_id][1]) == self.membership.revision
            self.end(worker_id)

    @rule(seconds=st.integers(1, 10))
    def pass_time(self, seconds: int) -> None:
        """As the sweep does it: stop at each expiry."""
        end_s = self.clock() + seconds
        while (next_s := self.membership.next_expiry_s()) is not None and next_s <= end_s:
            self.clock.now_s = next_s
            self.membership.expire()
            over = {worker_id for worker_id, (_, _, lease_end_s) in self.alive.items() if lease_end_s <= next_s}
            assert over == {gone.worker.worker_id for gone in self.changes[-1].removed}
            assert {gone.reason for gone in self.changes[-1].removed} == {RemovalReason.LEASE_EXPIRED}
            for worker_id in over:
                self.end(worker_id)
        self.clock.now_s = end_s

    @rule()
    def begin_to_watch(self) -> None:
        view = self.membership.view()
        watcher = RegistryView(self.clock)
        watcher.apply_snapshot("r", view.revision, [entry.worker for entry in view.entries])
        self.replayed.append(watcher)

    @invariant()
    def revisions_are_contiguous(self) -> None:
        assert [change.revision for change in self.changes] == list(range(1, self.membership.revision + 1))
        assert all(change.upserted or change.removed for change in self.changes)

    @invariant()
    def the_view_is_the_models(self) -> None:
        view = self.membership.view()
        assert [e.worker for e in view.entries] == [self.alive[key][0] for key in sorted(self.alive)]
        addresses = [e.worker.address for e in view.entries]
        assert len(set(addresses)) == len(addresses)

    @invariant()
    def every_watcher_sees_the_same(self) -> None:
        expected = tuple(entry.worker for entry in self.membership.view().entries)
        for watcher in self.replayed:
            for change in self.changes[watcher.revision :]:
                removed = [(gone.worker.worker_id, gone.worker.epoch) for gone in change.removed]
                watcher.apply_delta("r", change.revision, change.upserted, removed)
            assert watcher.workers() == expected


TestMembershipMachine = MembershipMachine.TestCase
TestMembershipMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
