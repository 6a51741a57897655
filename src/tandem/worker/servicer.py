"""WorkerService: the role-independent calls of a worker, converted between protobuf and domain types."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1 import worker_service_pb2_grpc as pb_grpc
from tandem.engine.port import Engine
from tandem.errors import InvalidRequest, NotSupported
from tandem.rpc.convert import (
    ROLES,
    adapter_to_proto,
    load_figures,
    present,
    timestamp,
    unfinished_figures,
    worker_to_proto,
)
from tandem.worker import kv_messages, model_files, role_messages
from tandem.worker.adapters import Adapters
from tandem.worker.identity import Identity
from tandem.worker.legs import Legs
from tandem.worker.role_change import RoleChanges

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
LOAD_INTERVAL_MS = 1_000
LOAD_INTERVAL_MIN_MS = 10
LOAD_INTERVAL_MAX_MS = 60_000


class WorkerServicer(pb_grpc.WorkerServiceServicer):
    """Implements worker_service.proto."""

    def __init__(
        self,
        engine: Engine,
        legs: Legs,
        identity: Identity,
        ask_drain: Callable[[], None],
        counts: Callable[[], dict[str, int]] = dict,
        role_changes: RoleChanges | None = None,
        model: Path | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`ask_drain` makes the process drain and exit; `counts` returns the legs' counters since start. `model` is the
        directory whose files frontends may read; None: they may read none.
        """
        self._adapters = adapters
        self._role_changes = role_changes
        self._model = model
        self._counts = counts
        self._engine = engine
        self._legs = legs
        self._identity = identity
        self._ask_drain = ask_drain

    async def GetCapabilities(self, request: pb.GetCapabilitiesRequest, context: Any) -> pb.GetCapabilitiesResponse:  # noqa: N802
        """The worker's identity and capabilities."""
        roles = [] if self._role_changes is None else [ROLES[role] for role in self._role_changes.roles()]
        return pb.GetCapabilitiesResponse(worker=worker_to_proto(self._identity.current()), roles=roles)

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:  # noqa: N802
        """Stream the load: once now, then once per interval, and sooner when prompts come and are computed."""
        interval_s = _interval_s("interval_ms", present(request, "interval_ms", request.interval_ms))
        change_s = None
        if request.HasField("change_interval_ms"):
            change_s = min(interval_s, _interval_s("change_interval_ms", request.change_interval_ms))
        sequence = 0
        while True:
            sequence += 1
            version = self._legs.prompts.version
            yield await self._measure(sequence)
            if change_s is None:
                await asyncio.sleep(interval_s)
                continue
            await asyncio.sleep(change_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._legs.prompts.changed(version), interval_s - change_s)

    async def WatchKvEvents(  # noqa: N802
        self, request: pb.WatchKvEventsRequest, context: Any
    ) -> AsyncIterator[pb.WatchKvEventsResponse]:
        """Stream the changes of the prefix cache, or first its contents."""
        from_sequence = present(request, "from_sequence", request.from_sequence)
        if from_sequence is not None and request.snapshot:
            raise InvalidRequest("from_sequence", "must be absent together with snapshot")
        if from_sequence is not None and from_sequence < 1:
            raise InvalidRequest("from_sequence", "must be at least 1")
        cache = self._engine.kv_cache()
        updates: Any = cache.follow() if request.snapshot else cache.events(from_sequence)
        describe = kv_messages.Describe(
            epoch=lambda: self._identity.current().epoch,
            block_size_tokens=cache.block_size_tokens,
            with_token_ids=request.include_token_ids,
        )
        async with contextlib.aclosing(updates):
            async for update in updates:
                for message in describe.update(update):
                    yield message

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        """Abort a request's legs on this worker."""
        self._legs.check_epoch(request.worker_epoch)
        if not request.request_id:
            raise InvalidRequest("request_id", "is required")
        attempt = present(request, "attempt", request.attempt)
        return pb.AbortResponse(aborted_legs=self._legs.abort(request.request_id, attempt))

    async def Drain(self, request: pb.DrainRequest, context: Any) -> AsyncIterator[pb.DrainResponse]:  # noqa: N802
        """Start the drain, and stream the number of open legs each time it changes."""
        self._legs.check_epoch(request.worker_epoch)
        self._ask_drain()
        while True:
            yield pb.DrainResponse(open_legs=self._legs.open_count)
            if not self._legs.open_count:
                return
            await self._legs.wait_changed()

    async def FlushCache(self, request: pb.FlushCacheRequest, context: Any) -> pb.FlushCacheResponse:  # noqa: N802
        """Flush the prefix cache."""
        self._legs.check_epoch(request.worker_epoch)
        return pb.FlushCacheResponse(flushed=await self._engine.flush_cache())

    async def ChangeRole(  # noqa: N802
        self, request: pb.ChangeRoleRequest, context: Any
    ) -> AsyncIterator[pb.ChangeRoleResponse]:
        """Start a role change and stream its progress; it goes on when the call ends."""
        self._legs.check_epoch(request.worker_epoch)
        if self._role_changes is None:
            raise NotSupported("this worker changes no roles")
        progress = self._role_changes.begin(
            role_messages.checked_role(request.role), role_messages.checked_timeout(request)
        )
        async for step in progress.steps():
            yield pb.ChangeRoleResponse(change=role_messages.change_to_proto(step))

    async def ReadModelFiles(  # noqa: N802
        self, request: pb.ReadModelFilesRequest, context: Any
    ) -> AsyncIterator[pb.ReadModelFilesResponse]:
        """Stream the files of the model, without its weights."""
        if self._model is None:
            raise NotSupported("this worker has no model directory")
        async for name, data in model_files.parts(self._model):
            yield pb.ReadModelFilesResponse(name=name, data=data)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:  # noqa: N802
        """Load an adapter without serving it."""
        adapters = self._checked_adapters(request.worker_epoch)
        adapter, was_loaded = await adapters.load(request.name, request.path)
        return pb.LoadAdapterResponse(
            adapter=adapter_to_proto(adapter), was_loaded=was_loaded, is_served=adapters.serves(adapter)
        )

    async def ServeAdapter(self, request: pb.ServeAdapterRequest, context: Any) -> pb.ServeAdapterResponse:  # noqa: N802
        """Serve a loaded adapter, or stop to serve it."""
        await self._checked_adapters(request.worker_epoch).serve(request.name, serve=request.serve)
        return pb.ServeAdapterResponse()

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Any
    ) -> pb.UnloadAdapterResponse:
        """Unload an adapter when its last leg has ended."""
        was_loaded = await self._checked_adapters(request.worker_epoch).unload(request.name)
        return pb.UnloadAdapterResponse(was_loaded=was_loaded)

    def _checked_adapters(self, worker_epoch: int) -> Adapters:
        self._legs.check_epoch(worker_epoch)
        if self._adapters is None:
            raise NotSupported("this worker has no adapters")
        return self._adapters

    async def _measure(self, sequence: int) -> pb.WatchLoadResponse:
        load = await self._engine.load()
        return pb.WatchLoadResponse(
            sequence=sequence,
            measured_time=timestamp(time.time()),
            epoch=self._identity.current().epoch,
            open_legs=self._legs.open_count,
            **load_figures(load),
            **unfinished_figures(self._legs.prompts.read() if self._legs.computes_prompts else None),
            **self._counts(),
        )


def _interval_s(field: str, interval_ms: int | None) -> float:
    """Seconds of an interval of load reports; None: the default.

    Raises:
        InvalidRequest: out of range.
    """
    if interval_ms is None:
        interval_ms = LOAD_INTERVAL_MS
    if not LOAD_INTERVAL_MIN_MS <= interval_ms <= LOAD_INTERVAL_MAX_MS:
        raise InvalidRequest(field, f"must be {LOAD_INTERVAL_MIN_MS} to {LOAD_INTERVAL_MAX_MS}")
    return interval_ms / 1_000
