"""Adoption of a dead registry's leases: the new owner keeps them, also while Consul shows the dead one's entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from tandem_registry.backends.consul.broadcaster import Broadcaster
from tandem_registry.backends.consul.client import ConsulClient
from tandem_registry.backends.consul.lease_manager import LeaseManager
from tandem_registry.backends.consul.reconciler import SETTLE_S, Reconciler
from tandem_registry.backends.consul.records import Record, Replica, service_id
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Entry, observed_of
from tandem_registry.backends.subscriptions import Subscriptions
from tandem_registry.view import Health

from tests.unit.support.registry_workers import make_worker

OWN, DEAD = "own", "dead"
WORKER = make_worker("decode-0", 7, "127.0.0.1:7")
WRITTEN = Record(member=WORKER, lease_id="lease", owner=DEAD, term=3)
ENTRY_ID = service_id("tandem", WRITTEN)


def shown(index: int, worker: Record) -> ConsulSnapshot:
    """Consul's answer: this registry, and one worker."""
    replica = Record(member=Replica(replica_id=OWN, epoch=1, address="127.0.0.1:1"), owner=OWN)
    records = (replica, worker)
    return observed_of(index, [Entry("node", service_id("tandem", r), r, Health.PASSING) for r in records])


def test_a_lease_that_was_taken_over_stays_while_its_own_entry_is_on_its_way() -> None:
    now_s = [100.0]
    reconciler = Reconciler(cast("ConsulClient", None), OWN, lambda: now_s[0])
    arguments: dict[str, Any] = {"replica_id": OWN, "service": "tandem", "ttl_s": 60.0, "clock": lambda: now_s[0]}
    leases = LeaseManager(**arguments, reconciler=reconciler, new_lease_id=lambda: "another")
    leases.take(shown(1, WRITTEN))
    leases.adopt()
    # A replica is dead when it has been absent for a lease's time.
    now_s[0] += 61.0
    for index in (2, 3):
        leases.take(shown(index, WRITTEN))
        leases.adopt()
        now_s[0] += 0.05
    adopted = reconciler.wanted(ENTRY_ID)
    assert adopted is not None
    assert (adopted.owner, adopted.term, adopted.lease_id) == (OWN, 4, "lease")
    now_s[0] += 2 * SETTLE_S
    leases.take(shown(4, adopted))
    assert reconciler.wanted(ENTRY_ID) == adopted, "it removes the lease it has taken over"
    leases.keep_alive("lease", None)


def test_a_former_registry_at_ones_own_address_is_removed() -> None:
    """A killed registry's entry would pass its check for ever: the one that was started again answers it."""
    arguments: dict[str, Any] = {"replica_id": OWN, "service": "tandem", "ttl_s": 60.0, "clock": lambda: 0.0}
    reconciler = Reconciler(cast("ConsulClient", None), OWN, lambda: 0.0)
    leases = LeaseManager(**arguments, reconciler=reconciler, new_lease_id=lambda: "another")
    # The clock went back between the two: the dead one looks newer.
    replicas = {OWN: ("127.0.0.1:1", 5), DEAD: ("127.0.0.1:1", 9), "elsewhere": ("127.0.0.1:2", 1)}
    records = {
        name: Record(member=Replica(replica_id=name, epoch=epoch, address=address), owner=name)
        for name, (address, epoch) in replicas.items()
    }
    entries = [Entry("node", service_id("tandem", r), r, Health.PASSING) for r in records.values()]
    leases.take(observed_of(1, entries))
    assert [orphan.service_id for orphan in leases.own_stale_entries()] == [service_id("tandem", records[DEAD])]


def test_a_former_start_in_old_data_is_no_news() -> None:
    """Consul restored from a copy lists a worker's previous start: the view waits for the present one's entry."""
    newer = replace(WRITTEN, member=replace(WORKER, epoch=8), lease_id="newer")
    broadcaster = Broadcaster(Subscriptions(), 0.0)
    broadcaster.publish("one", shown(5, newer), {}, 0.0)
    old = shown(3, WRITTEN)
    assert broadcaster.missing("another", old, ()) == [newer.key]
    assert broadcaster.missing("one", old, ()) == [], "in one life of the data the winner counts"
    assert broadcaster.missing("another", shown(6, newer), ()) == []
