"""RegistryService.ChangeRole: the rule that keeps a worker in every role, and what is passed on to the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytest_asyncio
from tandem_registry.app import RegistryApp
from tandem_registry.backends.port import Backend
from tandem_registry.role_changes import UNCONFIRMED_S, RoleChanges
from tandem_registry.view import Health, Listed, Origin, View

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import role_change_pb2, worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.client.role_calls import Leading, campaign, change_role
from tandem.clock import ManualClock
from tandem.domain.worker import Worker, WorkerRole, WorkerState
from tandem.errors import (
    InvalidRequest,
    NotSupported,
    RoleChangeRefused,
    ServiceError,
    StaleEpoch,
    TandemError,
    WorkerNotFound,
)
from tandem.rpc.channels import Channels, open_channel
from tandem.rpc.convert import worker_to_proto
from tandem.rpc.server import RpcServer
from tandem.testing.eventually import assert_eventually
from tests.wire.support.registry_host import consul_settings, make_worker, serve_registry

PREFILL, DECODE = WorkerRole.PREFILL, WorkerRole.DECODE
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
TO_PREFILL = worker_pb2.WORKER_ROLE_PREFILL
DRAINING, DONE = role_change_pb2.ROLE_CHANGE_STAGE_DRAINING, role_change_pb2.ROLE_CHANGE_STAGE_DONE


class PlayedWorker(pb_grpc.WorkerServiceServicer):
    """Takes every role at once, or what each test sets."""

    GetCapabilities: Any = pb_grpc.WorkerServiceServicer.GetCapabilities
    WatchLoad: Any = pb_grpc.WorkerServiceServicer.WatchLoad
    WatchKvEvents: Any = pb_grpc.WorkerServiceServicer.WatchKvEvents
    Abort: Any = pb_grpc.WorkerServiceServicer.Abort
    Drain: Any = pb_grpc.WorkerServiceServicer.Drain
    FlushCache: Any = pb_grpc.WorkerServiceServicer.FlushCache
    ReadModelFiles: Any = pb_grpc.WorkerServiceServicer.ReadModelFiles
    LoadAdapter: Any = pb_grpc.WorkerServiceServicer.LoadAdapter
    ServeAdapter: Any = pb_grpc.WorkerServiceServicer.ServeAdapter
    UnloadAdapter: Any = pb_grpc.WorkerServiceServicer.UnloadAdapter

    def __init__(self) -> None:
        self.address = ""
        self.asked: list[pb.ChangeRoleRequest] = []
        self.error: TandemError | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def ChangeRole(  # noqa: N802
        self, request: pb.ChangeRoleRequest, context: Any
    ) -> AsyncIterator[pb.ChangeRoleResponse]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        yield pb.ChangeRoleResponse(change=role_change_pb2.RoleChange(stage=DRAINING, open_legs=3))
        await self.may_end.wait()
        yield pb.ChangeRoleResponse(change=role_change_pb2.RoleChange(stage=DONE, in_place=True))


@pytest_asyncio.fixture
async def played() -> AsyncIterator[PlayedWorker]:
    worker = PlayedWorker()
    server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, worker))])
    await server.start("127.0.0.1", 0)
    worker.address = f"127.0.0.1:{server.port}"
    yield worker
    await server.stop(0)


@pytest.fixture(params=["memory", "consul"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {} if request.param == "memory" else consul_settings(request.getfixturevalue("consul"))


@pytest_asyncio.fixture
async def registry(settings: dict[str, Any]) -> AsyncIterator[RegistryApp]:
    async with serve_registry(ttl_s=20, **settings) as app:
        yield app


async def register(registry: RegistryApp, *workers: Worker) -> None:
    async with open_channel(registry.address) as channel:
        stub: Any = RegistryServiceStub(channel)
        for worker in workers:
            await stub.Register(registry_pb.RegisterRequest(worker=worker_to_proto(worker)))


async def change(registry: RegistryApp, worker_id: str = "decode-0", **more: Any) -> list[role_change_pb2.RoleChange]:
    return [step async for step in change_role(registry.address, worker_id, PREFILL, **more)]


async def test_a_change_is_passed_on_with_its_epoch_and_timeout_and_so_is_the_progress(
    registry: RegistryApp, played: PlayedWorker
) -> None:
    await register(registry, make_worker("decode-0", 7, played.address), make_worker("decode-1"))
    steps = await change(registry, drain_timeout_s=1.5)
    assert [(step.stage, step.open_legs) for step in steps] == [(DRAINING, 3), (DONE, 0)]
    (asked,) = played.asked
    assert (asked.worker_epoch, asked.role) == (7, worker_pb2.WORKER_ROLE_PREFILL)
    assert asked.drain_timeout.ToNanoseconds() == 1_500_000_000
    await change(registry, epoch=7)
    assert not played.asked[1].HasField("drain_timeout")


async def test_the_last_worker_of_its_role_and_model_changes_only_when_forced(
    registry: RegistryApp, played: PlayedWorker
) -> None:
    draining = replace(make_worker("decode-2"), state=WorkerState.DRAINING)
    other_model = make_worker("decode-3", model="other")
    await register(registry, make_worker("decode-0", 1, played.address), draining, other_model)
    with pytest.raises(RoleChangeRefused, match="no other decode worker of model tiny is serving") as refused:
        await change(registry)
    assert refused.value.metadata == {"worker": "decode-0", "role": "prefill"}
    assert not played.asked
    assert (await change(registry, force=True))[-1].stage == DONE


async def test_a_worker_whose_change_was_passed_on_counts_as_gone_before_the_view_shows_it(
    registry: RegistryApp, played: PlayedWorker
) -> None:
    await register(registry, make_worker("decode-0", 1, played.address), make_worker("decode-1"))
    played.may_end.clear()
    first = change_role(registry.address, "decode-0", PREFILL)
    assert (await anext(first)).stage == DRAINING
    with pytest.raises(RoleChangeRefused, match="no other decode worker"):
        await change(registry, "decode-1")
    played.may_end.set()
    assert [step.stage async for step in first] == [DONE]


async def test_a_worker_that_refuses_stays_in_its_role_for_the_others(
    registry: RegistryApp, played: PlayedWorker
) -> None:
    async with AsyncExitStack() as stack:
        other = PlayedWorker()
        server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, other))])
        await server.start("127.0.0.1", 0)
        stack.push_async_callback(server.stop, 0)
        await register(
            registry,
            make_worker("decode-0", 1, played.address),
            make_worker("decode-1", 1, f"127.0.0.1:{server.port}"),
        )
        for error in (RoleChangeRefused("its setting roles"), NotSupported("an older release")):
            played.error = error
            with pytest.raises(type(error), match=str(error)):
                await change(registry)
        assert (await change(registry, "decode-1"))[-1].stage == DONE


@pytest.mark.parametrize(
    ("request_", "error", "sentence"),
    [
        ({"worker_id": "decode-7", "role": TO_PREFILL}, WorkerNotFound, "'decode-7'"),
        ({"worker_id": "decode-0", "role": TO_PREFILL, "epoch": 6}, StaleEpoch, "its epoch is 7, not 6"),
        ({"worker_id": "decode-0", "role": TO_PREFILL, "epoch": 0}, InvalidRequest, "epoch: must be at least 1"),
        ({"worker_id": "decode-0"}, InvalidRequest, "role: must be PREFILL, DECODE or AGGREGATED"),
        ({"worker_id": "a b", "role": TO_PREFILL}, InvalidRequest, "worker_id: must be 1 to"),
    ],
    ids=["unknown", "stale", "epoch", "role", "id"],
)
async def test_bad_input_is_refused_by_name(
    request_: dict[str, Any], error: type[TandemError], sentence: str, played: PlayedWorker
) -> None:
    workers = [make_worker("decode-0", 7, played.address), make_worker("decode-1")]
    changes = RoleChanges(scripted_backend(workers), Channels())
    with pytest.raises(error, match=sentence):
        await anext(changes.change(registry_pb.ChangeRoleRequest(**request_)))
    assert not played.asked


async def test_a_worker_that_cannot_be_reached_is_an_error_and_stays(played: PlayedWorker) -> None:
    gone, other = make_worker("decode-0", 1, "127.0.0.1:9"), make_worker("decode-1", 1, played.address)
    channels = Channels()
    changes = RoleChanges(scripted_backend([gone, other]), channels)
    with pytest.raises(ServiceError):
        await anext(changes.change(registry_pb.ChangeRoleRequest(worker_id="decode-0", role=TO_PREFILL)))
    steps = [
        step async for step in changes.change(registry_pb.ChangeRoleRequest(worker_id="decode-1", role=TO_PREFILL))
    ]
    assert steps[-1].stage == DONE
    await channels.close()


async def test_role_changes_caller_that_leaves_before_the_first_step_keeps_the_worker_for_a_while_only(
    played: PlayedWorker,
) -> None:
    class Silent(PlayedWorker):
        async def ChangeRole(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
            self.asked.append(request)
            await asyncio.Event().wait()
            yield

    silent, clock, channels = Silent(), ManualClock(100.0), Channels()
    server = RpcServer([(SERVICE_NAME, partial(pb_grpc.add_WorkerServiceServicer_to_server, silent))])
    await server.start("127.0.0.1", 0)
    workers = [make_worker("decode-0", 1, f"127.0.0.1:{server.port}"), make_worker("decode-1", 1, played.address)]
    changes = RoleChanges(scripted_backend(workers), channels, clock)
    leaver = asyncio.create_task(
        anext(changes.change(registry_pb.ChangeRoleRequest(worker_id="decode-0", role=TO_PREFILL)))
    )
    await assert_eventually(lambda: len(silent.asked), lambda count: count == 1, within_s=20)
    leaver.cancel()
    await asyncio.wait((leaver,))
    other = registry_pb.ChangeRoleRequest(worker_id="decode-1", role=TO_PREFILL)
    clock.advance(UNCONFIRMED_S / 2)
    with pytest.raises(RoleChangeRefused, match="no other decode worker"):
        await anext(changes.change(other))
    clock.advance(UNCONFIRMED_S)
    assert [step.stage async for step in changes.change(other)] == [DRAINING, DONE]
    await channels.close()
    await server.stop(0)


async def test_a_view_that_is_not_live_allows_no_change_even_if_forced(played: PlayedWorker) -> None:
    workers = [make_worker("decode-0", 1, played.address), make_worker("decode-1")]
    changes = RoleChanges(scripted_backend(workers, is_live=False), Channels())
    with pytest.raises(RoleChangeRefused, match="only the last known view"):
        await anext(changes.change(registry_pb.ChangeRoleRequest(worker_id="decode-0", role=TO_PREFILL, force=True)))
    assert not played.asked


async def test_a_worker_whose_health_check_fails_does_not_count(played: PlayedWorker) -> None:
    workers = [make_worker("decode-0", 1, played.address), make_worker("decode-1")]
    changes = RoleChanges(scripted_backend(workers, {"decode-1": Health.CRITICAL}), Channels())
    with pytest.raises(RoleChangeRefused, match="no other decode worker"):
        await anext(changes.change(registry_pb.ChangeRoleRequest(worker_id="decode-0", role=TO_PREFILL)))


def scripted_backend(
    workers: list[Worker], health: dict[str, Health] | None = None, *, is_live: bool = True
) -> Backend:
    """A backend with this view."""
    listed = tuple(Listed(w, 0.1, "r", (health or {}).get(w.worker_id, Health.UNKNOWN)) for w in workers)

    async def view() -> View:
        return View("r", 1, listed)

    return cast("Backend", SimpleNamespace(view=view, origin=Origin(is_live, 0.0)))


async def test_only_the_leader_of_the_present_term_changes_a_role(registry: RegistryApp, played: PlayedWorker) -> None:
    await register(registry, make_worker("decode-0", 1, played.address), make_worker("decode-1"))
    election = "roles-of-workers"
    first = await campaign(registry.address, election, "controller-a")
    assert first.leader_id == "controller-a"
    assert first.time_to_live.ToNanoseconds() == 60 * 10**9
    waiting = await campaign(registry.address, election, "controller-b")
    assert (waiting.leader_id, waiting.term) == ("controller-a", first.term)
    assert (await change(registry, leading=Leading(election=election, term=first.term)))[-1].stage == DONE
    await campaign(registry.address, election, "controller-a", resign=True)
    with pytest.raises(RoleChangeRefused, match="it has no leader"):
        await change(registry, leading=Leading(election=election, term=first.term))
    second = await campaign(registry.address, election, "controller-b")
    assert (second.leader_id, second.term > first.term) == ("controller-b", True)
    with pytest.raises(RoleChangeRefused, match=f"it has term {second.term}"):
        await change(registry, leading=Leading(election=election, term=first.term))
    assert len(played.asked) == 1
    with pytest.raises(InvalidRequest, match="candidate_id: must be 1 to"):
        await campaign(registry.address, election, "a b")
