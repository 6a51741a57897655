"""Start, drain and stop order of a worker process.

Start: port -> metrics -> engine -> canary -> serve -> register -> SERVING; a worker is registered only after its engine
has generated, and SERVING only once it is registered: frontends can route to it. Its role may change then:
`role_change`.
Drain: DRAINING in the registry and NOT_SERVING to health checks while legs are still accepted -> settle -> close
admission -> wait for the open legs (prefill: for every KV hand-over) -> deregister; legs that are open at the drain
timeout end with the server, and their streams continue on other workers. Fenced (another process has
registered at this worker's id or address): NOT_SERVING, close admission, finish the open legs, exit status 1. Stop:
server, then engine, then metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tandem
from tandem.api.admin.v1.admin_service_pb2_grpc import add_ProfileServiceServicer_to_server
from tandem.api.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from tandem.api.worker.v2.step_service_pb2_grpc import add_StepServiceServicer_to_server
from tandem.clock import epoch_now
from tandem.discovery import Registration
from tandem.discovery.advertised import log_doubts
from tandem.domain.network_address import join_address
from tandem.domain.worker import LEG_CONTRACT, Worker, WorkerRole, WorkerState, capabilities_digest, default_worker_id
from tandem.engine.factory import create_engine
from tandem.engine.port import Engine
from tandem.engine.role_engine import RoleEngine
from tandem.errors import StartError
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.logs import log_leg
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Metrics, open_metrics
from tandem.observability.profiles import Profiles, Wanted
from tandem.observability.request_trace import LegTrace
from tandem.observability.span_export import export_spans, resource
from tandem.observability.trace_store import TraceStore
from tandem.rpc.profile_servicer import SERVICE_NAME as PROFILE_SERVICE_NAME
from tandem.rpc.profile_servicer import ProfileServicer
from tandem.rpc.server import RpcServer
from tandem.service.awake_timers import AwakeTimers
from tandem.service.background import BackgroundTasks
from tandem.service.process import freeze_again
from tandem.worker.adapters import Adapters, check_files, load_first
from tandem.worker.config import WorkerConfig
from tandem.worker.engine_health import EngineHealth, Periods, pass_canary
from tandem.worker.identity import Identity
from tandem.worker.kv_messages import log_refusal
from tandem.worker.legs import Legs
from tandem.worker.role_change import Parts, RoleChanges
from tandem.worker.roles.role_services import every_service, idle_services
from tandem.worker.server_health import ServerHealth
from tandem.worker.servicer import SERVICE_NAME, WorkerServicer
from tandem.worker.stats import DroppedMessages, LegStats, WorkerStats
from tandem.worker.step_servicer import SERVICE_NAME as STEP_SERVICE_NAME
from tandem.worker.step_servicer import StepServicer
from tandem.worker.steps import StepStreams

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5
CHROME_TRACE = "chrome_trace"
LEG_BYTES_MAX = 16 * 2**20
"""Maximum size of one leg request: a million token ids of five bytes, and a grammar."""


class EngineProfiler:
    """A `tandem.observability.profiles.Profiler`: a worker's profile is its engine's."""

    forms: tuple[str, ...] = (CHROME_TRACE,)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def start(self, directory: Path, form: str, wanted: Wanted) -> EngineRecording:
        """Start recording in the engine."""
        await self._engine.start_profile(directory, steps_max=wanted.steps_max, with_stack=wanted.with_stack)
        return EngineRecording(self._engine)


class EngineRecording:
    """A `tandem.observability.profiles.Recording`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def stop(self) -> None:
        """Stop recording; return when the files are written."""
        await self._engine.stop_profile()


class WorkerHost:
    """A registered worker, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(
        self, config: WorkerConfig, address: str, metrics: Metrics, engine: RoleEngine, registration: Registration,
        identity: Identity, legs: Legs, server: RpcServer, adapters: Adapters,
    ) -> None:  # fmt: skip
        self.address = address
        """host:port of the gRPC server."""
        self._config = config
        self._metrics = metrics
        self._engine = engine
        self._registration = registration
        self._identity = identity
        self._legs = legs
        self._adapters = adapters
        self._health = ServerHealth(server, lambda: idle_services(identity.current().role))
        self._drain_requested = asyncio.Event()
        periods = Periods(config.canary_period_s, config.canary_timeout_s)
        self._engine_health = EngineHealth(engine, lambda: legs.batch_count, periods, self._health.report)
        self._streams = StepStreams(legs.abort_stream)
        self._tasks = BackgroundTasks()
        self._roles = RoleChanges(self._parts(), self._note_engine)

    @classmethod
    def open(cls, config: WorkerConfig, role: WorkerRole) -> AbstractAsyncContextManager[WorkerHost]:
        """Construct the engine in its first role. Entering starts a worker, exiting stops it.

        Entering returns when the worker is registered, and retries without limit while no registry is reachable.

        Raises:
            StartError: the port is in use, a TLS file is unusable, the engine cannot start or fails its canary, or
                the registry rejects the worker.
        """
        # Now, because the imports of an engine would delay the handling of a signal that comes after entering.
        engine = RoleEngine(
            lambda wanted: create_engine(config.engine, config.engine_settings(wanted)),
            role,
            partial(check_files, config.adapter_places),
        )
        return cls._open(config, role, engine)

    @classmethod
    @asynccontextmanager
    async def _open(cls, config: WorkerConfig, role: WorkerRole, engine: RoleEngine) -> AsyncIterator[WorkerHost]:
        async with AsyncExitStack() as stack:
            server = RpcServer(request_bytes_max=LEG_BYTES_MAX, tls=config.tls)
            stack.push_async_callback(server.stop, STOP_GRACE_S)
            # Bind before the engine starts: a port conflict shows at once, not after minutes of loading a model.
            server.bind(config.host, config.port)
            address = join_address(config.reachable_host, server.port)
            worker_id = config.worker_id or default_worker_id(role, address)
            metrics = open_metrics(config, Emitter.WORKER, f"tandem-{role.value}", config.tls)
            stack.push_async_callback(metrics.stop)
            await metrics.start(worker_id)
            traces = _open_traces(config, role, worker_id, stack)
            timers = AwakeTimers()
            stack.callback(timers.close)
            stack.push_async_callback(engine.stop)
            await engine.start()
            await pass_canary(engine, config.canary_timeout_s)
            first = await load_first(engine, config.adapter_places, config.adapters)
            worker = replace(_describe(engine, worker_id, address, role), adapters=first)
            registration = Registration(config.registry, worker, tls=config.tls)
            identity = Identity(worker, registration)
            registration.when_superseded(identity.supersede)
            legs = Legs(engine, identity, traces, timers)
            adapters = Adapters(engine, identity, legs, config.adapter_places, first)
            app = cls(config, address, metrics, engine, registration, identity, legs, server, adapters)
            app._add_services(server, LegStats(traces))
            # Again, because a server that serves must stop before the engine does.
            stack.push_async_callback(server.stop, STOP_GRACE_S)
            await server.serve()
            await app._health.report(None)
            stack.push_async_callback(registration.close)
            app._watch_itself(traces, await stack.enter_async_context(app._tasks))
            stack.push_async_callback(app._roles.stop)
            await _register(registration, engine, worker, config.registry)
            await app._health.note_registered()
            yield app

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: metrics are off."""
        return self._metrics.port

    async def drain(self) -> bool:
        """Drain in the order given at the top of this module. Returns True, also when the drain timed out.

        A worker that was asked to leave within a bound has done so: frontends continue its streams elsewhere, and
        report the few that cannot be continued.
        """
        self._metrics.count("tandem.drains")
        await self._roles.stop()
        await self._registration.set_state(WorkerState.DRAINING)
        await self._health.leave()
        await asyncio.sleep(self._config.drain_settle_s)
        try:
            await self._finish_legs()
        finally:
            await self._registration.close()
        return True

    async def wait_finished(self) -> str | None:
        """Return why the worker must stop, or None when a Drain call requested it.

        A fenced worker finishes its open legs first: their frontends still read them, but send no new ones.
        """
        trouble = await _first(
            self._engine.wait_failed(),
            self._roles.wait_failed(),
            self._registration.wait_fenced(),
            self._wait_drain_requested(),
        )
        if self._registration.fenced is not None:
            await self._roles.stop()
            await self._health.leave()
            await _first(self._engine.wait_failed(), self._finish_legs())
        return trouble

    def _parts(self) -> Parts:
        config, first = self._config, self._identity.current()
        roles = config.allowed_roles(first.role)
        return Parts(
            engine=self._engine,
            adapters=self._adapters,
            registration=self._registration,
            identity=self._identity,
            legs=self._legs,
            streams=self._streams,
            server_health=self._health,
            engine_health=self._engine_health,
            metrics=self._metrics,
            describe=lambda role: _describe(self._engine, first.worker_id, first.address, role),
            roles=roles,
            drain_settle_s=config.drain_settle_s,
            drain_timeout_s=config.drain_timeout_s,
            canary_timeout_s=config.canary_timeout_s,
        )

    def _note_engine(self, in_place: bool) -> None:
        if not in_place:
            # Of the former engine, whose objects were exempted from collection at the start. No stream is open now.
            freeze_again()
        self._watch_kv_events()

    def _watch_kv_events(self) -> None:
        self._tasks.start(log_refusal(self._engine, self._identity.current().worker_id), "kv-events-refusal")

    def _add_services(self, server: RpcServer, stats: LegStats) -> None:
        identity, ask_drain = self._identity, self._drain_requested.set
        model = self._config.model
        common = WorkerServicer(
            self._engine, self._legs, identity, ask_drain, stats.counts, self._roles, model, self._adapters
        )
        server.add(SERVICE_NAME, partial(add_WorkerServiceServicer_to_server, common))
        steps = StepServicer(self._legs, self._streams)
        server.add(STEP_SERVICE_NAME, partial(add_StepServiceServicer_to_server, steps))
        for name, add in every_service(self._legs, self._streams, identity.current):
            server.add(name, add)
        profiles = ProfileServicer(Profiles(EngineProfiler(self._engine), enabled=self._config.admin_enabled))
        server.add(PROFILE_SERVICE_NAME, partial(add_ProfileServiceServicer_to_server, profiles))

    def _watch_itself(self, traces: TraceStore[LegTrace], tasks: BackgroundTasks) -> None:
        """Start the tasks that notice pauses of this process and troubles of its engine, and the gauges."""
        tasks.start(self._identity.beat(), "heartbeat")
        self._watch_kv_events()
        tasks.start(self._engine_health.watch(), "engine-health")
        if self._metrics.is_on:
            leg_metrics = LegMetrics(self._metrics)
            traces.sinks.append(leg_metrics)
            self._metrics.measure(WorkerStats(self._engine, self._legs, self._engine_health, leg_metrics).read)
            tasks.start(DroppedMessages(self._engine, self._metrics).watch(), "dropped-messages")

    async def _finish_legs(self) -> None:
        """Close admission and wait for the open legs, at most for the drain timeout."""
        self._legs.close_admission()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._legs.wait_none()
        except TimeoutError:
            timeout_s = self._config.drain_timeout_s
            log.warning(
                "drain timed out after %g s: %d open legs end here, and their streams continue on other workers",
                timeout_s, self._legs.open_count,
            )  # fmt: skip

    async def _wait_drain_requested(self) -> None:
        await self._drain_requested.wait()


def _open_traces(config: WorkerConfig, role: WorkerRole, worker_id: str, stack: AsyncExitStack) -> TraceStore[LegTrace]:
    """The traces of the legs; their spans are exported where a collector is configured."""
    traces: TraceStore[LegTrace] = TraceStore([log_leg])
    spans = export_spans(traces, config.otlp_endpoint, config.trace_sample_ratio, resource(role.value, worker_id))
    if spans is not None:
        stack.push_async_callback(asyncio.to_thread, spans.close)
    return traces


async def _register(registration: Registration, engine: Engine, worker: Worker, registries: Sequence[str]) -> None:
    await log_doubts(worker.address, registries)
    await registration.start()
    trouble = await _first(registration.wait_registered(), registration.wait_fenced(), engine.wait_failed())
    if trouble is not None:
        raise StartError(trouble)


def _describe(engine: Engine, worker_id: str, address: str, role: WorkerRole) -> Worker:
    bootstrap, capabilities = engine.bootstrap_address(), engine.capabilities()
    return Worker(
        worker_id=worker_id,
        epoch=epoch_now(),
        role=role,
        address=address,
        capabilities=capabilities,
        capabilities_digest=capabilities_digest(capabilities),
        release=tandem.__version__,
        leg_contract=LEG_CONTRACT,
        bootstrap_host=bootstrap.host if bootstrap else None,
        bootstrap_port=bootstrap.port if bootstrap else None,
    )


async def _first(*waits: Coroutine[Any, Any, str | None]) -> str | None:
    """The result of the coroutine that ends first; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
