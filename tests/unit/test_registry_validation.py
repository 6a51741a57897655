"""What a worker says about itself: each rule names its field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from registry_workers import make_worker
from tandem_registry.validation import checked_state, checked_worker

from tandem.api.types.v1 import worker_pb2
from tandem.errors import InvalidRequest
from tandem.rpc.messages import worker_to_proto


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
