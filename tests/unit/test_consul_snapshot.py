"""Snapshots of Consul: a pure function of the entries, whatever their order and the replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_registry.backends.consul.parsing import ResponseReader
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, Entry, change_between, observed_of
from tandem_registry.view import Health, RemovalReason, View

from tandem.domain.frontend import Member
from tandem.domain.worker import WorkerState
from tests.unit.support.consul_entries import answer_of, make_entry, make_replica, registry_entry
from tests.unit.support.examples import examples
from tests.unit.support.registry_workers import make_frontend, make_worker, members_of


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """What several agents could list, each under its own names."""
    found: dict[tuple[str, str], Entry] = {}
    for _ in range(draw(st.integers(0, 8))):
        makers: list[Callable[..., Member]] = [make_worker, make_frontend]
        make = draw(st.sampled_from(makers))
        member = make(draw(st.sampled_from("abc")), draw(st.integers(1, 3)), draw(st.sampled_from(["h:1", "h:2"])))
        member = replace(member, state=draw(st.sampled_from(WorkerState)))
        entry = make_entry(
            member,
            owner=draw(st.sampled_from(["one", "two"])),
            term=draw(st.integers(1, 3)),
            node=draw(st.sampled_from(["n", "m"])),
            health=draw(st.sampled_from(Health)),
            is_gone=draw(st.booleans()),
        )
        found[(entry.node, entry.service_id)] = entry
    for replica_id in draw(st.lists(st.sampled_from(["one", "two"]), unique=True)):
        entry = registry_entry(replica_id, health=draw(st.sampled_from(Health)))
        found[(entry.node, entry.service_id)] = entry
    return list(found.values())


def ids(view: View) -> list[str]:
    return [member.member_id for member in members_of(view)]


@given(found=entries(), data=st.data())
def test_the_order_of_the_answer_means_nothing(found: list[Entry], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(found))
    one, two = observed_of(7, found), observed_of(7, shuffled)
    assert one == two
    assert list(one.members) == list(two.members)
    assert one.view("g") == two.view("g")


@given(found=entries())
def test_a_view_has_one_start_of_each_member_and_one_member_at_each_address(found: list[Entry]) -> None:
    view = observed_of(1, found).view("g")
    members = members_of(view)
    keys = [(member.kind, member.member_id) for member in members]
    assert len(set(keys)) == len(keys)
    assert len({member.address for member in members}) == len(members)
    for member in members:
        rivals = [e.record for e in found if e.record.key == (member.kind, member.member_id)]
        assert member.epoch == max(record.member.epoch for record in rivals), "an older start is never shown"


@settings(max_examples=examples(50))
@given(history=st.lists(entries(), min_size=1, max_size=8), data=st.data())
def test_replicas_that_skip_different_answers_agree_wherever_they_meet(
    history: list[list[Entry]], data: st.DataObject
) -> None:
    """Each replica reads some of the answers and applies changes; at an index that both read they hold the same."""
    views = []
    for _ in range(2):
        read = sorted(data.draw(st.sets(st.integers(0, len(history) - 1))) | {len(history) - 1})
        reader, observed = ResponseReader(), ConsulSnapshot()
        held: dict[tuple[str, str], Member] = {}
        at: dict[int, Any] = {}
        for index in read:
            after = observed_of(index, reader.entries(answer_of(history[index])))
            change = change_between(observed, after)
            for gone in change.removed if change else ():
                held.pop((gone.member.kind, gone.member.member_id))
            held |= {(member.kind, member.member_id): member for member in (change.upserted if change else ())}
            observed = after
            at[index] = dict(held)
            assert held == {key: entry.record.member for key, entry in after.members.items()}
        views.append(at)
    one, two = views
    assert all(one[index] == two[index] for index in one.keys() & two.keys())
    assert len(history) - 1 in one.keys() & two.keys()


def test_the_newest_start_counts_even_while_it_is_not_healthy() -> None:
    old = make_entry(make_worker("w", 1, "h:1"))
    new = make_entry(make_worker("w", 2, "h:2"), node="m", health=Health.CRITICAL)
    assert ids(observed_of(1, [old, new]).view("g")) == []
    assert ids(observed_of(1, [old]).view("g")) == ["w"]


def test_of_two_names_at_one_address_the_one_that_started_last_counts() -> None:
    found = [make_entry(make_worker("old", 1, "h:1")), make_entry(make_worker("new", 2, "h:1"))]
    assert ids(observed_of(1, found).view("g")) == ["new"]


def test_a_lease_that_was_taken_over_counts_from_its_new_lease_keeper() -> None:
    found = [make_entry(make_worker()), make_entry(make_worker(), owner="two", term=2, node="m")]
    (entry,) = observed_of(1, found).view("g").workers
    assert entry.owner == "two"


def test_an_end_outweighs_what_another_agent_still_lists() -> None:
    found = [make_entry(make_worker()), make_entry(make_worker(), owner="two", term=2, node="m", is_gone=True)]
    observed = observed_of(1, found)
    assert ids(observed.view("g")) == []
    assert not observed.by_lease


def test_a_draining_member_is_listed_although_it_does_not_serve() -> None:
    draining = make_entry(make_worker(state=WorkerState.DRAINING), health=Health.CRITICAL)
    (entry,) = observed_of(1, [draining]).view("g").workers
    assert entry.health is Health.CRITICAL
    assert ids(observed_of(1, [make_entry(make_worker(), health=Health.CRITICAL)]).view("g")) == []


@pytest.mark.parametrize(
    ("entry", "is_alive"),
    [
        (registry_entry("one"), True),
        (registry_entry("one", health=Health.CRITICAL), False),
        (registry_entry("one", is_node_alive=False), False),
    ],
)
def test_a_registry_lives_as_long_as_it_and_its_agent_do(entry: Entry, is_alive: bool) -> None:
    assert ("one" in observed_of(1, [entry]).replicas) is is_alive


def test_a_worker_outlives_the_agent_it_was_entered_at() -> None:
    assert ids(observed_of(1, [make_entry(make_worker(), is_node_alive=False)]).view("g")) == ["decode-0"]


def test_a_registry_that_was_restarted_is_one_registry() -> None:
    found = [
        make_entry(replace(make_replica("old"), address="h:7"), owner="old"),
        make_entry(replace(make_replica("new", 2), address="h:7"), owner="new"),
    ]
    assert observed_of(1, found).replicas == {"new"}


def test_removal_reasons_are_those_known_else_derived_from_the_response() -> None:
    before = observed_of(1, [make_entry(make_worker("a")), make_entry(make_worker("b")), make_entry(make_worker("c"))])
    after = observed_of(5, [make_entry(make_worker("c", 2))])
    change = change_between(before, after, {("worker", "a", 1): RemovalReason.DEREGISTERED})
    assert change is not None
    assert change.revision == 5
    assert {gone.member.member_id: gone.reason for gone in change.removed} == {
        "a": RemovalReason.DEREGISTERED,
        "b": RemovalReason.LEASE_EXPIRED,
        "c": RemovalReason.REPLACED,
    }
    assert change_between(after, replace(after, index=9)) is None, "who keeps a lease, and load, are no change of view"
