"""Consul records round-trip a whole member; altered entries are rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_registry.backends.consul.records import (
    Record,
    Replica,
    Unreadable,
    check_fits,
    host_and_port,
    meta,
    record_of,
    service_id,
    tags,
)

from tandem.domain.worker import LEG_CONTRACT, Worker, WorkerRole, WorkerState, capabilities_digest
from tandem.errors import InvalidRequest
from tests.unit.support.registry_workers import make_frontend, make_worker

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=64)


def written(record: Record) -> Record:
    return record_of(*host_and_port(record), meta(record))


@given(
    model=TEXT,
    eos=st.lists(st.integers(0, 2**31 - 1), max_size=9),
    is_mla=st.booleans(),
    state=st.sampled_from(WorkerState),
    role=st.sampled_from(WorkerRole),
    address=st.sampled_from(["h:1", "10.0.0.7:30001", "[::1]:5"]),
    has_digest=st.booleans(),
    leg_contract=st.integers(1, 9),
)
def test_a_worker_comes_back_whole(
    model: str,
    eos: list[int],
    is_mla: bool,
    state: WorkerState,
    role: WorkerRole,
    address: str,
    has_digest: bool,
    leg_contract: int,
) -> None:
    worker = make_worker("w", 7, address, model=model, state=state)
    worker = replace(worker, leg_contract=leg_contract)
    worker = replace(worker, role=role, capabilities=replace(worker.capabilities, eos_token_ids=tuple(eos)))
    worker = replace(worker, capabilities=replace(worker.capabilities, is_mla=is_mla))
    if role is WorkerRole.PREFILL:
        worker = replace(worker, bootstrap_host="h", bootstrap_port=9)
    if has_digest:
        worker = replace(worker, capabilities_digest=capabilities_digest(worker.capabilities))
    record = Record(member=worker, lease_id="l", owner="k", term=3)
    assert written(record) == record
    assert len(meta(record)) <= 64
    assert tags(record) == [role.value]


def test_an_entry_without_a_leg_contract_is_of_a_worker_that_speaks_the_first_one() -> None:
    """As registries wrote them before there was a second one."""
    record = Record(member=make_worker(), lease_id="l", owner="k")
    old = meta(record)
    assert old.pop("leg_contract") == str(LEG_CONTRACT)
    read = record_of(*host_and_port(record), old).member
    assert isinstance(read, Worker)
    assert read.leg_contract == 1


def test_frontends_and_registries_come_back_whole() -> None:
    frontend = Record(member=make_frontend(), lease_id="l", owner="k")
    assert written(frontend) == frontend
    replica = Record(member=Replica(replica_id="r", epoch=3, address="h:1", release="1"), owner="r")
    assert written(replica) == replica


def test_an_entry_that_says_that_its_member_is_gone() -> None:
    gone = written(Record(member=make_worker(), lease_id="l", owner="k", is_gone=True))
    assert gone.is_gone
    assert gone.key == ("worker", "decode-0")


def test_starts_of_a_member_never_share_a_name() -> None:
    names = {
        service_id("tandem", Record(member=member, owner="k"))
        for member in (make_worker("a"), make_worker("a", 2), make_frontend("a"), make_frontend("a", 2))
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocabulary_size", "513"),
        ("vocabulary_size", "many"),
        ("is_mla", "perhaps"),
        ("role", "chef"),
        ("state", "asleep"),
        ("kind", "teapot"),
        ("epoch", ""),
        ("leg_contract", "two"),
        ("keeper", None),
        ("lease_id", None),
        ("capabilities_digest", "0" * 64),
    ],
)
def test_a_changed_record_is_not_accepted(key: str, value: str | None) -> None:
    worker = make_worker()
    worker = replace(worker, capabilities_digest=capabilities_digest(worker.capabilities))
    record = Record(member=worker, lease_id="l", owner="k")
    changed = meta(record)
    if value is None:
        del changed[key]
    else:
        changed[key] = value
    with pytest.raises(Unreadable):
        record_of(*host_and_port(record), changed)


def test_a_record_that_consul_cannot_store_is_refused_with_its_field() -> None:
    check_fits(make_worker(model="m" * 256))
    with pytest.raises(InvalidRequest) as refusal:
        check_fits(make_worker(model="ü" * 257))
    assert refusal.value.field == "worker.capabilities.model"
    with pytest.raises(InvalidRequest) as refusal:
        check_fits(replace(make_frontend(), model="ü" * 257))
    assert refusal.value.field == "frontend.model"
