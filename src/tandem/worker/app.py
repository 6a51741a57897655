"""The life of a worker process: engine, canary, server, registry; and back.

Start: metrics -> engine -> canary -> listen -> register; nobody hears of a worker whose engine has not generated.
Drain: DRAINING in the registry and NOT_SERVING to health checks while legs are still taken -> settle -> end of
admission -> wait for the open legs (prefill: for every hand-over) -> deregister. Fenced (another start has its place):
NOT_SERVING, end of admission, the open legs, exit status 1. Stop: server, then engine, then metrics.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import tandem
from tandem.api.admin.v1.admin_service_pb2_grpc import add_ProfileServiceServicer_to_server
from tandem.api.worker.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server
from tandem.api.worker.v2.step_service_pb2_grpc import add_StepServiceServicer_to_server
from tandem.clock import epoch_now
from tandem.discovery import Registration
from tandem.domain.worker import LEG_CONTRACT, Worker, WorkerRole, WorkerState, capabilities_digest, default_worker_id
from tandem.engine.factory import create_engine
from tandem.errors import EngineFailed, StartError
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.logs import log_leg
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import open_metrics
from tandem.observability.profiles import Profiles
from tandem.observability.request_trace import LegTrace
from tandem.observability.span_export import SpanExport, export_spans, resource
from tandem.observability.trace_store import TraceStore
from tandem.rpc.profile_servicer import SERVICE_NAME as PROFILE_SERVICE_NAME
from tandem.rpc.profile_servicer import ProfileServicer
from tandem.rpc.server import AddServicer, RpcServer
from tandem.service.awake_timers import AwakeTimers
from tandem.worker.config import WorkerConfig
from tandem.worker.engine_health import EngineHealth, Periods
from tandem.worker.engine_profile import EngineProfiler
from tandem.worker.identity import Identity
from tandem.worker.legs import Legs
from tandem.worker.servicer import SERVICE_NAME, WorkerServicer
from tandem.worker.stats import LegStats, WorkerStats
from tandem.worker.step_servicer import SERVICE_NAME as STEP_SERVICE_NAME
from tandem.worker.step_servicer import StepServicer
from tandem.worker.steps import StepStreams

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5
LEG_BYTES_MAX = 16 * 2**20
"""Of one leg: a million token ids of five bytes, and a grammar."""

RoleServices = Callable[[Legs, StepStreams, Worker], list[tuple[str, AddServicer]]]
"""Makes the services of the role: of each its full name, and what adds its servicer to a server."""


class WorkerHost:
    """A worker as `tandem.service.process` runs it."""

    def __init__(self, config: WorkerConfig, role: WorkerRole, role_services: RoleServices) -> None:
        self._config = config
        self._role = role
        self._role_services = role_services
        self._engine = create_engine(config.engine, config.engine_settings(role))
        self._traces: TraceStore[LegTrace] = TraceStore([log_leg])
        self._spans: SpanExport | None = None
        self._metrics = open_metrics(config, Emitter.WORKER, f"tandem-{role.value}", config.tls)
        self._server: RpcServer | None = None
        self._registration: Registration | None = None
        self._legs: Legs | None = None
        self._timers = AwakeTimers()
        self._tasks: list[asyncio.Task[None]] = []
        self._health: EngineHealth | None = None
        self._is_leaving = False
        self._drain_asked = asyncio.Event()

    @property
    def address(self) -> str:
        """host:port it serves at, once started."""
        assert self._server is not None, "address before start()"
        return f"{self._config.reachable_host}:{self._server.port}"

    @property
    def metrics_port(self) -> int:
        """Where it is scraped, once started; 0: nowhere."""
        return self._metrics.port

    async def start(self) -> None:
        """Return when the worker is registered; waits for a registry as long as it takes.

        Raises:
            StartError: the port is taken, a TLS file cannot be used, the engine cannot start or fails its canary, or
                the registry refuses.
        """
        server = self._server = RpcServer(request_bytes_max=LEG_BYTES_MAX, tls=self._config.tls)
        # First, because an engine takes long to start, only to find that somebody else listens here.
        server.bind(self._config.host, self._config.port)
        await self._metrics.start(self._worker_id)
        await self._engine.start()
        await self._pass_canary()
        worker = self._describe()
        self._spans = export_spans(
            self._traces,
            self._config.otlp_endpoint,
            self._config.trace_sample_ratio,
            resource(self._role.value, worker.worker_id),
        )
        registration = self._registration = Registration(self._config.registry, worker, tls=self._config.tls)
        identity = Identity(worker, registration)
        registration.when_superseded(identity.supersede)
        self._legs = Legs(self._engine, identity, self._traces, self._timers)
        counts = LegStats(self._traces).counts
        servicer = WorkerServicer(self._engine, self._legs, identity, self._drain_asked.set, counts)
        server.add(SERVICE_NAME, partial(add_WorkerServiceServicer_to_server, servicer))
        streams = StepStreams(self._legs.abort_stream)
        server.add(STEP_SERVICE_NAME, partial(add_StepServiceServicer_to_server, StepServicer(self._legs, streams)))
        for name, add in self._role_services(self._legs, streams, worker):
            server.add(name, add)
        profiles = ProfileServicer(Profiles(EngineProfiler(self._engine), enabled=self._config.admin_enabled))
        server.add(PROFILE_SERVICE_NAME, partial(add_ProfileServiceServicer_to_server, profiles))
        await server.serve()
        await server.set_serving(True)
        legs, periods = self._legs, Periods(self._config.canary_period_s, self._config.canary_timeout_s)
        health = self._health = EngineHealth(self._engine, lambda: legs.batch_count, periods, self._tell_health)
        self._tasks = [
            asyncio.create_task(identity.beat(), name="heartbeat"),
            asyncio.create_task(health.watch(), name="engine-health"),
        ]
        if self._metrics.is_on:
            self._tell_metrics(self._legs, health)
        await self._register(registration)

    async def drain(self) -> bool:
        """See the module. Returns whether every leg ended within the drain's bound."""
        assert self._server is not None, "drain() before start()"
        assert self._legs is not None, "drain() before start()"
        assert self._registration is not None, "drain() before start()"
        self._metrics.count("tandem.drains")
        await self._registration.set_state(WorkerState.DRAINING)
        await self._leave(self._server)
        await asyncio.sleep(self._config.drain_settle_s)
        try:
            return await self._finish_legs(self._legs)
        finally:
            await self._registration.close()

    async def stop(self) -> None:
        """Free everything, also when `start` failed."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._registration is not None:
            await self._registration.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        await self._engine.stop()
        self._timers.close()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        await self._metrics.stop()

    async def wait_finished(self) -> str | None:
        """Return why the worker cannot go on, or None when a Drain call asked it to end.

        A worker that was fenced has finished its legs by then: their frontends hold on to them, but send no new ones.
        """
        assert self._registration is not None, "wait_finished() before start()"
        assert self._server is not None, "wait_finished() before start()"
        assert self._legs is not None, "wait_finished() before start()"
        trouble = await _first(self._engine.wait_failed(), self._registration.wait_fenced(), self._asked_to_drain())
        if self._registration.fenced is not None:
            await self._leave(self._server)
            await _first(self._engine.wait_failed(), self._until_legs_end(self._legs))
        return trouble

    @property
    def _worker_id(self) -> str:
        return self._config.worker_id or default_worker_id(self._role, self.address)

    def _tell_metrics(self, legs: Legs, health: EngineHealth) -> None:
        leg_metrics = LegMetrics(self._metrics)
        self._traces.sinks.append(leg_metrics)
        self._metrics.measure(WorkerStats(self._engine, legs, health, leg_metrics).read)

    async def _leave(self, server: RpcServer) -> None:
        """NOT_SERVING from here on, whatever the engine's health."""
        self._is_leaving = True
        await server.set_serving(False)

    async def _tell_health(self, trouble: str | None) -> None:
        assert self._server is not None, "health before start()"
        if not self._is_leaving:
            await self._server.set_serving(trouble is None)

    async def _finish_legs(self, legs: Legs) -> bool:
        """Admit no more legs and wait for the open ones. Returns whether all ended within the drain's bound."""
        legs.close_admission()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await legs.wait_none()
        except TimeoutError:
            log.error("%d legs still open after %g s: they end now", legs.open_count, self._config.drain_timeout_s)
            return False
        return True

    async def _until_legs_end(self, legs: Legs) -> None:
        await self._finish_legs(legs)

    async def _pass_canary(self) -> None:
        try:
            async with asyncio.timeout(self._config.canary_timeout_s):
                await self._engine.canary()
        except TimeoutError:
            raise StartError(f"the engine's canary did not end within {self._config.canary_timeout_s:g} s") from None
        except EngineFailed as problem:
            raise StartError(f"the engine failed its canary: {problem}") from None

    async def _register(self, registration: Registration) -> None:
        await registration.start()
        trouble = await _first(registration.wait_registered(), registration.wait_fenced(), self._engine.wait_failed())
        if trouble is not None:
            raise StartError(trouble)

    async def _asked_to_drain(self) -> None:
        await self._drain_asked.wait()

    def _describe(self) -> Worker:
        bootstrap, capabilities = self._engine.bootstrap_address(), self._engine.capabilities()
        return Worker(
            worker_id=self._worker_id,
            epoch=epoch_now(),
            role=self._role,
            address=self.address,
            capabilities=capabilities,
            capabilities_digest=capabilities_digest(capabilities),
            release=tandem.__version__,
            leg_contract=LEG_CONTRACT,
            bootstrap_host=bootstrap.host if bootstrap else None,
            bootstrap_port=bootstrap.port if bootstrap else None,
        )


async def _first(*waits: Coroutine[Any, Any, str | None]) -> str | None:
    """The result of whichever ends first; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
