"""Validation of registrations: each error names its field."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from tandem_registry.validation import checked_frontend, checked_state, checked_worker

from tandem.api.types.v1 import worker_pb2
from tandem.domain.worker import LEG_CONTRACT, capabilities_digest, field_names
from tandem.errors import InvalidRequest
from tandem.rpc.convert import frontend_to_proto, worker_to_proto
from tests.unit.support.registry_workers import make_frontend, make_worker


def valid(role: worker_pb2.WorkerRole.ValueType = worker_pb2.WORKER_ROLE_DECODE) -> worker_pb2.Worker:
    message = worker_to_proto(make_worker(address="10.0.0.7:30001"))
    message.role = role
    if role == worker_pb2.WORKER_ROLE_PREFILL:
        message.bootstrap.host, message.bootstrap.port = "10.0.0.7", 8998
    return message


def prefill() -> worker_pb2.Worker:
    return valid(worker_pb2.WORKER_ROLE_PREFILL)


def changed(message: worker_pb2.Worker, change: Callable[[worker_pb2.Worker], object]) -> worker_pb2.Worker:
    change(message)
    return message


@pytest.mark.parametrize("message", [valid(), prefill(), valid(worker_pb2.WORKER_ROLE_AGGREGATED)])
def test_a_whole_worker_passes(message: worker_pb2.Worker) -> None:
    assert worker_to_proto(checked_worker(message)) == message


def test_a_worker_that_does_not_say_its_leg_contract_speaks_the_first_one() -> None:
    assert checked_worker(valid()).leg_contract == LEG_CONTRACT
    assert checked_worker(changed(valid(), lambda w: w.ClearField("leg_contract"))).leg_contract == 1


@pytest.mark.parametrize("address", ["h:1", "worker-0.zone.svc:65535", "[::1]:50051", "127.0.0.1:1"])
def test_addresses_that_pass(address: str) -> None:
    assert checked_worker(changed(valid(), lambda w: setattr(w, "address", address))).address == address


@pytest.mark.parametrize(
    "address", ["", "h", "h:", ":1", "h:0", "h:65536", "a b:1", "h:1x", "::1:5", "0.0.0.0:1", "[::]:1"]
)
def test_addresses_that_do_not(address: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked_worker(changed(valid(), lambda w: setattr(w, "address", address)))
    assert refusal.value.field == "worker.address"


@pytest.mark.parametrize("worker_id", ["", "a b", "ü", "a/b", "a\n", "x" * 129])
def test_worker_ids_that_do_not_pass(worker_id: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked_worker(changed(valid(), lambda w: setattr(w, "worker_id", worker_id)))
    assert refusal.value.field == "worker.worker_id"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("worker.epoch", changed(valid(), lambda w: setattr(w, "epoch", 0))),
        ("worker.epoch", changed(valid(), lambda w: setattr(w, "epoch", -1))),
        ("worker.role", changed(valid(), lambda w: w.ClearField("role"))),
        ("worker.role", changed(valid(), lambda w: setattr(w, "role", 9))),
        ("worker.state", changed(valid(), lambda w: w.ClearField("state"))),
        ("worker.capabilities", changed(valid(), lambda w: w.ClearField("capabilities"))),
        ("worker.capabilities.model", changed(valid(), lambda w: w.capabilities.ClearField("model"))),
        ("worker.bootstrap", changed(prefill(), lambda w: w.ClearField("bootstrap"))),
        ("worker.bootstrap.host", changed(prefill(), lambda w: w.bootstrap.ClearField("host"))),
        ("worker.bootstrap.port", changed(prefill(), lambda w: w.bootstrap.ClearField("port"))),
        ("worker.bootstrap.port", changed(prefill(), lambda w: setattr(w.bootstrap, "port", 65536))),
        ("worker.bootstrap", changed(valid(), lambda w: setattr(w.bootstrap, "port", 1))),
        ("worker.leg_contract", changed(valid(), lambda w: setattr(w, "leg_contract", 0))),
    ],
)
def test_each_rule_names_its_field(field: str, message: worker_pb2.Worker) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked_worker(message)
    assert refusal.value.field == field


def test_the_state_of_a_sign_of_life_may_be_absent_but_not_unknown() -> None:
    assert checked_state(worker_pb2.WORKER_STATE_UNSPECIFIED) is None
    with pytest.raises(InvalidRequest) as refusal:
        checked_state(9)
    assert refusal.value.field == "state"


def test_a_digest_that_fits_passes_and_another_one_is_refused() -> None:
    fitting = capabilities_digest(make_worker().capabilities)
    message = changed(valid(), lambda w: setattr(w, "capabilities_digest", fitting))
    assert checked_worker(message).capabilities_digest == fitting
    message.capabilities.vocabulary_size += 1
    with pytest.raises(InvalidRequest) as refusal:
        checked_worker(message)
    assert refusal.value.field == "worker.capabilities_digest"
    message.ClearField("capabilities_digest")
    assert checked_worker(message).capabilities_digest is None


def test_the_digest_is_the_contracts() -> None:
    """Written out once, as worker.proto says it: another implementation must get the same."""
    text = (
        "engine=simulated\nengine_version=1\nmodel=tiny\nmodel_digest=m\ntokenizer_digest=t\n"
        "context_tokens_max=2048\nkv_capacity_tokens=4096\nrunning_requests_max=8\nvocabulary_size=512\n"
        "eos_token_ids=2,3\npage_size_tokens=1\nkv_dtype=float32\nkv_layout=mha:2x2x32\nkv_bytes_per_token=1024\n"
        "transfer_backend=simulated\ntensor_parallel_size=1\nis_mla=false\n"
    )
    capabilities = replace(make_worker().capabilities, eos_token_ids=(2, 3))
    assert capabilities_digest(capabilities) == hashlib.sha256(text.encode()).hexdigest()
    numbers = [field.number for field in worker_pb2.WorkerCapabilities.DESCRIPTOR.fields]
    named = [worker_pb2.WorkerCapabilities.DESCRIPTOR.fields_by_name[name].number for name in field_names()]
    assert named == sorted(numbers), "the digest covers every field of the contract, in the order of their numbers"


def test_a_whole_frontend_passes_and_each_rule_names_its_field() -> None:
    message = frontend_to_proto(make_frontend())
    assert checked_frontend(message) == make_frontend()
    wrong = {"frontend_id": "a b", "epoch": 0, "address": "0.0.0.0:1", "model": "", "state": 9, "release": "r" * 65}
    for field, value in wrong.items():
        broken = worker_pb2.Frontend()
        broken.CopyFrom(message)
        setattr(broken, field, value)
        with pytest.raises(InvalidRequest) as refusal:
            checked_frontend(broken)
        assert refusal.value.field == f"frontend.{field}"
