"""Each contract of registry_service.proto, over a socket, wherever membership is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tandem_registry.app import RegistryApp

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import worker_pb2
from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.errors import (
    DuplicateWorker,
    InvalidRequest,
    Overloaded,
    RevisionAhead,
    StaleEpoch,
    StartError,
    WorkerNotFound,
)
from tandem.rpc.channels import open_channel
from tandem.rpc.convert import worker_to_proto
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import (
    TTL_S,
    consul_settings,
    error_of,
    frontend_request,
    make_worker,
    port_of,
    register_request,
    serve_registry,
)


@pytest.fixture(params=["memory", "consul"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where membership is kept; in Consul each test has a service name of its own."""
    if request.param == "memory":
        return {}
    return consul_settings(request.getfixturevalue("consul"))


@pytest_asyncio.fixture
async def app(settings: dict[str, Any]) -> AsyncIterator[RegistryApp]:
    async with serve_registry(**settings) as app:
        yield app


@pytest_asyncio.fixture
async def channel(app: RegistryApp) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(app.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return RegistryServiceStub(channel)


async def listed(stub: Any, model: str | None = None) -> list[str]:
    return [entry.worker.worker_id for entry in (await stub.List(pb.ListRequest(model=model))).workers]


async def test_register_then_list(stub: Any) -> None:
    granted = await stub.Register(register_request())
    assert granted.lease_id
    assert granted.time_to_live.ToNanoseconds() / 1e9 == pytest.approx(TTL_S)
    view = await stub.List(pb.ListRequest())
    assert view.revision == granted.revision > 0
    assert view.registry_id
    assert view.workers[0].worker == worker_to_proto(make_worker())
    assert 0 <= view.workers[0].lease_age.ToNanoseconds() / 1e9 < TTL_S


async def test_watch_begins_with_a_snapshot_and_goes_on_with_every_change(stub: Any) -> None:
    await stub.Register(register_request("a", epoch=1))
    watch = stub.Watch(pb.WatchRequest())
    snapshot = await watch.read()
    assert [worker.worker_id for worker in snapshot.snapshot.workers] == ["a"]
    granted = await stub.Register(register_request("a", epoch=2))
    replaced = await watch.read()
    assert [(gone.epoch, gone.reason) for gone in replaced.delta.removed] == [(1, pb.REMOVAL_REASON_REPLACED)]
    assert [worker.epoch for worker in replaced.delta.upserted] == [2]
    await stub.Drain(pb.DrainRequest(worker_id="a", epoch=2))
    drained = await watch.read()
    assert drained.delta.upserted[0].state == worker_pb2.WORKER_STATE_DRAINING
    await stub.Deregister(pb.DeregisterRequest(lease_id=granted.lease_id))
    gone = await watch.read()
    assert gone.delta.removed[0].reason == pb.REMOVAL_REASON_DEREGISTERED
    steps = [snapshot, replaced, drained, gone]
    assert [step.previous_revision for step in steps[1:]] == [step.revision for step in steps[:-1]]
    assert snapshot.revision < replaced.revision < drained.revision < gone.revision
    assert {step.registry_id for step in steps} == {snapshot.registry_id}


async def test_watch_and_list_can_be_of_one_model(stub: Any) -> None:
    await stub.Register(register_request("a", model="one"))
    await stub.Register(register_request("b", model="two"))
    assert await listed(stub, "two") == ["b"]
    watch = stub.Watch(pb.WatchRequest(model="two"))
    first = await watch.read()
    assert [worker.worker_id for worker in first.snapshot.workers] == ["b"]
    await stub.Register(register_request("a", epoch=2, model="one"))
    await stub.Register(register_request("c", model="two"))
    elsewhere = await watch.read()
    assert elsewhere.previous_revision == first.revision
    assert not elsewhere.delta.upserted
    assert not elsewhere.delta.removed
    step = await watch.read()
    assert [worker.worker_id for worker in step.delta.upserted] == ["c"]
    assert step.previous_revision == elsewhere.revision
    # A worker that changes its model leaves this view and enters no other one here.
    await stub.Register(register_request("b", epoch=2, model="one"))
    step = await watch.read()
    assert [gone.worker_id for gone in step.delta.removed] == ["b"]
    assert not step.delta.upserted


async def test_a_lease_lives_as_long_as_it_is_kept_alive_and_then_leaves_the_view(stub: Any) -> None:
    loop = asyncio.get_running_loop()
    watch = stub.Watch(pb.WatchRequest())
    await watch.read()
    lease_id = (await stub.Register(register_request())).lease_id
    await watch.read()
    keeping = stub.KeepAlive()
    started_s = loop.time()
    while loop.time() - started_s < 2.5 * TTL_S:
        await keeping.write(pb.KeepAliveRequest(lease_id=lease_id))
        assert (await keeping.read()).time_to_live.ToNanoseconds() / 1e9 == pytest.approx(TTL_S)
        assert await listed(stub) == ["decode-0"]
        last_s = loop.time()
    await keeping.done_writing()
    assert await keeping.read() is grpc.aio.EOF
    assert await listed(stub) == ["decode-0"], "the end of the stream is not the end of the lease"
    gone = await asyncio.wait_for(watch.read(), 5)
    assert gone.delta.removed[0].reason == pb.REMOVAL_REASON_LEASE_EXPIRED
    assert TTL_S - 0.05 <= loop.time() - last_s < TTL_S + 0.5


async def test_a_sign_of_life_can_carry_the_state(stub: Any) -> None:
    lease_id = (await stub.Register(register_request())).lease_id
    keeping = stub.KeepAlive()
    await keeping.write(pb.KeepAliveRequest(lease_id=lease_id, state=worker_pb2.WORKER_STATE_DRAINING))
    await keeping.read()

    async def states() -> list[int]:
        return [entry.worker.state for entry in (await stub.List(pb.ListRequest())).workers]

    await assert_eventually(states, lambda found: found == [worker_pb2.WORKER_STATE_DRAINING], within_s=TTL_S)
    keeping.cancel()


async def test_a_sign_of_life_for_a_lease_that_is_over(stub: Any) -> None:
    keeping = stub.KeepAlive()
    await keeping.write(pb.KeepAliveRequest(lease_id="over"))
    assert isinstance(await error_of(keeping.read()), WorkerNotFound)


async def test_a_restart_at_the_same_address_takes_over_at_once(stub: Any) -> None:
    first = (await stub.Register(register_request(epoch=1))).lease_id
    await stub.Register(register_request(epoch=2))
    assert [entry.worker.epoch for entry in (await stub.List(pb.ListRequest())).workers] == [2]
    assert isinstance(await error_of(stub.Deregister(pb.DeregisterRequest(lease_id=first))), WorkerNotFound)
    await stub.Register(register_request("renamed", epoch=3, address="decode-0:1"))
    assert await listed(stub) == ["renamed"]


async def test_a_start_that_is_not_newer_is_refused(stub: Any) -> None:
    await stub.Register(register_request(epoch=5))
    by_id = await error_of(stub.Register(register_request(epoch=5, address="elsewhere:1")))
    assert isinstance(by_id, DuplicateWorker)
    assert by_id.metadata == {
        "worker": "decode-0", "epoch": "5", "address": "decode-0:1", "field": "worker_id", "lease_ttl_ms": "600"
    }  # fmt: skip
    by_address = await error_of(stub.Register(register_request("other", epoch=4, address="decode-0:1")))
    assert isinstance(by_address, DuplicateWorker)
    assert by_address.metadata["field"] == "address"


@pytest.mark.parametrize(
    ("method", "request_message", "field"),
    [
        ("RegisterFrontend", pb.RegisterFrontendRequest(), "frontend"),
        ("RegisterFrontend", frontend_request(epoch=0), "frontend.epoch"),
        ("Register", pb.RegisterRequest(), "worker"),
        ("Register", register_request("not an id"), "worker.worker_id"),
        ("Register", register_request(epoch=0), "worker.epoch"),
        ("Register", register_request(address="nowhere"), "worker.address"),
        ("Drain", pb.DrainRequest(epoch=1), "worker_id"),
        ("Drain", pb.DrainRequest(worker_id="a"), "epoch"),
        ("Deregister", pb.DeregisterRequest(), "lease_id"),
        ("Deregister", pb.DeregisterRequest(lease_id="l" * 129), "lease_id"),
        ("List", pb.ListRequest(model="m" * 2**20), "request"),
    ],
)
async def test_a_wrong_field_is_named(stub: Any, method: str, request_message: Any, field: str) -> None:
    error = await error_of(getattr(stub, method)(request_message))
    assert isinstance(error, InvalidRequest)
    assert error.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.KeepAliveRequest(), "lease_id"),
        (pb.KeepAliveRequest(lease_id="l", state=7), "state"),  # type: ignore[arg-type]
    ],
)
async def test_a_wrong_field_of_a_sign_of_life_is_named(stub: Any, message: pb.KeepAliveRequest, field: str) -> None:
    keeping = stub.KeepAlive()
    await keeping.write(message)
    error = await error_of(keeping.read())
    assert isinstance(error, InvalidRequest)
    assert error.field == field


@pytest.mark.parametrize(
    ("data", "field"), [(b"\xff\xff\xff", "request"), (b"\x0a\x02\xff\xfe", "lease_id")], ids=["garbage", "no UTF-8"]
)
async def test_a_sign_of_life_that_cannot_be_parsed_is_named(
    channel: grpc.aio.Channel, data: bytes, field: str
) -> None:
    keeping: Any = channel.stream_stream("/tandem.api.registry.v1.RegistryService/KeepAlive")()
    await keeping.write(data)
    error = await error_of(keeping.read())
    assert isinstance(error, InvalidRequest)
    assert error.field == field


async def test_signs_of_life_end_typed_when_the_registry_goes(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_registry(**settings) as app, open_channel(app.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        keeping = stub.KeepAlive()
        await keeping.write(pb.KeepAliveRequest(lease_id=(await stub.Register(register_request())).lease_id))
        await keeping.read()
        assert await app.drain()
        assert (await error_of(keeping.read())).reason == "DRAINING"
    assert not [record for record in caplog.records if record.exc_info], "a stop is no defect"


async def test_drain_of_an_unknown_worker_and_of_another_start_is_refused(stub: Any) -> None:
    unknown = await error_of(stub.Drain(pb.DrainRequest(worker_id="ghost", epoch=1)))
    assert isinstance(unknown, WorkerNotFound)
    assert unknown.metadata == {"worker": "ghost"}
    await stub.Register(register_request(epoch=2))
    stale = await error_of(stub.Drain(pb.DrainRequest(worker_id="decode-0", epoch=1)))
    assert isinstance(stale, StaleEpoch)
    assert stale.metadata == {"worker": "decode-0", "expected": "1", "actual": "2"}


async def test_a_digest_that_does_not_fit_is_refused_and_nothing_is_lost(stub: Any) -> None:
    await stub.Register(register_request("a"))
    request = register_request("b")
    request.worker.capabilities_digest = "0" * 64
    error = await error_of(stub.Register(request))
    assert isinstance(error, InvalidRequest)
    assert error.field == "worker.capabilities_digest"
    assert await listed(stub) == ["a"]


async def test_a_role_that_does_not_exist_is_refused(stub: Any) -> None:
    request = register_request()
    request.worker.role = 9  # type: ignore[assignment]  # no role
    error = await error_of(stub.Register(request))
    assert isinstance(error, InvalidRequest)
    assert error.field == "worker.role"
    assert await listed(stub) == []


async def test_a_watch_from_the_future_gets_an_error(stub: Any) -> None:
    granted = await stub.Register(register_request())
    known_registry_id = (await stub.List(pb.ListRequest())).registry_id
    ahead = pb.WatchRequest(known_registry_id=known_registry_id, known_revision=granted.revision + 1_000)
    error = await error_of(stub.Watch(ahead).read())
    assert isinstance(error, RevisionAhead)
    assert error.metadata["field"] == "known_revision"
    for known in (
        pb.WatchRequest(known_registry_id=known_registry_id, known_revision=granted.revision),
        pb.WatchRequest(known_registry_id="another", known_revision=granted.revision + 1_000),
    ):
        assert len((await stub.Watch(known).read()).snapshot.workers) == 1


async def test_a_delta_names_the_revision_it_follows(stub: Any) -> None:
    """Changes of frontends are none of a watcher of workers: the next delta follows the one it got."""
    watch = stub.Watch(pb.WatchRequest())
    held = (await watch.read()).revision
    for number in range(3):
        await stub.Register(register_request(f"w-{number}"))
        await stub.RegisterFrontend(frontend_request(f"f-{number}"))
        step = await watch.read()
        assert step.previous_revision == held
        assert step.revision > held
        assert [worker.worker_id for worker in step.delta.upserted] == [f"w-{number}"]
        held = step.revision


async def test_frontends_are_listed_and_watched_whole(stub: Any) -> None:
    await stub.RegisterFrontend(frontend_request("other", model="other"))
    watch = stub.WatchFrontends(pb.WatchFrontendsRequest(model="tiny"))
    assert (await watch.read()).frontends == []
    granted = await stub.RegisterFrontend(frontend_request("b"))
    assert granted.time_to_live.ToNanoseconds() / 1e9 == pytest.approx(TTL_S)
    await stub.RegisterFrontend(frontend_request("a"))
    seen = [[frontend.frontend_id for frontend in (await watch.read()).frontends] for _ in range(2)]
    assert seen == [["b"], ["a", "b"]]
    view = await stub.List(pb.ListRequest(model="tiny"))
    assert [entry.frontend.frontend_id for entry in view.frontends] == ["a", "b"]
    assert view.workers == []
    keeping = stub.KeepAlive()
    await keeping.write(pb.KeepAliveRequest(lease_id=granted.lease_id, state=worker_pb2.WORKER_STATE_DRAINING))
    await keeping.read()
    assert (await watch.read()).frontends[1].state == worker_pb2.WORKER_STATE_DRAINING
    await stub.Deregister(pb.DeregisterRequest(lease_id=granted.lease_id))
    assert [frontend.frontend_id for frontend in (await watch.read()).frontends] == ["a"]
    keeping.cancel()


async def test_a_list_says_who_answers_and_where_its_view_is_from(stub: Any) -> None:
    await stub.Register(register_request())
    view = await stub.List(pb.ListRequest())
    assert view.source == pb.VIEW_SOURCE_LIVE
    assert abs(view.source_since.ToNanoseconds() / 1e9 - time.time()) < 30
    assert view.replica_id
    assert view.workers[0].lease_keeper == view.replica_id


async def test_health_is_watched_through_a_drain(app: RegistryApp, channel: grpc.aio.Channel, stub: Any) -> None:
    watch = stub.Watch(pb.WatchRequest())
    await watch.read()
    health: Any = health_pb2_grpc.HealthStub(channel)
    states = health.Watch(health_pb2.HealthCheckRequest(service="tandem.api.registry.v1.RegistryService"))
    assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
    draining = asyncio.create_task(app.drain())
    assert (await states.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert await listed(stub) == [], "it still answers while it says that it goes"
    assert await draining
    error = await error_of(watch.read())
    assert error.reason == "DRAINING"


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflection.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    call.cancel()
    assert {"tandem.api.registry.v1.RegistryService", "grpc.health.v1.Health"} <= names


async def test_a_watcher_that_does_not_read_is_dropped_with_a_typed_error(app: RegistryApp, stub: Any) -> None:
    """The stream stalls in HTTP/2 flow control, its queue fills, and the registry lets go of both."""
    backend: Any = app._backend
    # Without probing, the receive window stays at HTTP/2's 64 KiB instead of growing with the machine's speed.
    async with grpc.aio.insecure_channel(app.address, options=[("grpc.http2.bdp_probe", 0)]) as slow_channel:
        slow_stub: Any = RegistryServiceStub(slow_channel)
        watch = slow_stub.Watch(pb.WatchRequest())
        await watch.read()
        assert backend.watcher_count == 1
        epoch = 0
        while backend.watcher_count and epoch < 5000:
            epoch += 1
            await stub.Register(register_request(epoch=epoch, model="m" * MODEL_NAME_CHARS_MAX))
        assert backend.watcher_count == 0, "thousands of changes were kept for a watcher that reads none"
        assert isinstance(await error_of(_read_all(watch)), Overloaded)


async def _read_all(watch: Any) -> None:
    while await watch.read() is not grpc.aio.EOF:
        pass


async def test_a_model_name_with_control_characters_is_refused(stub: Any) -> None:
    for name in ("\x1b[31mred", "two\nlines", "turned\u202e"):
        refused = await error_of(stub.Register(register_request(epoch=1, model=name)))
        assert isinstance(refused, InvalidRequest)
        assert refused.field == "worker.capabilities.model"


async def test_a_port_in_use_is_one_sentence(app: RegistryApp) -> None:
    with pytest.raises(StartError, match=r"cannot listen on 127\.0\.0\.1"):
        async with serve_registry(port=port_of(app.address)):
            pass
