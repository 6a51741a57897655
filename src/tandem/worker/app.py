"""Start, drain and stop order of a worker process.

Start: metrics -> engine -> canary -> listen -> register; a worker is registered only after its engine has generated.
Drain: DRAINING in the registry and NOT_SERVING to health checks while legs are still accepted -> settle -> close
admission -> wait for the open legs (prefill: for every KV hand-over) -> deregister. Fenced (another process has
registered at this worker's id or address): NOT_SERVING, close admission, finish the open legs, exit status 1. Stop:
server, then engine, then metrics.
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
from tandem.worker.stats import DroppedMessages, LegStats, WorkerStats
from tandem.worker.step_servicer import SERVICE_NAME as STEP_SERVICE_NAME
from tandem.worker.step_servicer import StepServicer
from tandem.worker.steps import StepStreams

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5
LEG_BYTES_MAX = 16 * 2**20
"""Maximum size of one leg request: a million token ids of five bytes, and a grammar."""

RoleServices = Callable[[Legs, StepStreams, Worker], list[tuple[str, AddServicer]]]
"""Makes the gRPC services of a role: (full service name, function that adds the servicer to a server)."""


class WorkerHost:
    """A worker application: the start, drain, stop and wait_finished that `tandem.service.process` runs."""

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
        self._drain_requested = asyncio.Event()

    @property
    def address(self) -> str:
        """host:port of the gRPC server. Valid after `start`."""
        assert self._server is not None, "address before start()"
        return f"{self._config.reachable_host}:{self._server.port}"

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0: metrics are off. Valid after `start`."""
        return self._metrics.port

    async def start(self) -> None:
        """Return when the worker is registered; retries without limit while no registry is reachable.

        Raises:
            StartError: the port is in use, a TLS file is unusable, the engine cannot start or fails its canary, or
                the registry rejects the worker.
        """
        server = self._server = RpcServer(request_bytes_max=LEG_BYTES_MAX, tls=self._config.tls)
        # Bind before the engine starts: a port conflict shows at once, not after minutes of loading a model.
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
        servicer = WorkerServicer(self._engine, self._legs, identity, self._drain_requested.set, counts)
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
        health = self._health = EngineHealth(self._engine, lambda: legs.batch_count, periods, self._report_health)
        self._tasks = [
            asyncio.create_task(identity.beat(), name="heartbeat"),
            asyncio.create_task(health.watch(), name="engine-health"),
        ]
        if self._metrics.is_on:
            self._publish_metrics(self._legs, health)
        await self._register(registration)

    async def drain(self) -> bool:
        """Drain in the order given at the top of this module. Returns whether every leg ended within the timeout."""
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
        """Release everything; safe after a failed `start`."""
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
        """Return why the worker must stop, or None when a Drain call requested it.

        A fenced worker finishes its open legs first: their frontends still read them, but send no new ones.
        """
        assert self._registration is not None, "wait_finished() before start()"
        assert self._server is not None, "wait_finished() before start()"
        assert self._legs is not None, "wait_finished() before start()"
        trouble = await _first(
            self._engine.wait_failed(), self._registration.wait_fenced(), self._wait_drain_requested()
        )
        if self._registration.fenced is not None:
            await self._leave(self._server)
            await _first(self._engine.wait_failed(), self._until_legs_end(self._legs))
        return trouble

    @property
    def _worker_id(self) -> str:
        return self._config.worker_id or default_worker_id(self._role, self.address)

    def _publish_metrics(self, legs: Legs, health: EngineHealth) -> None:
        leg_metrics = LegMetrics(self._metrics)
        self._traces.sinks.append(leg_metrics)
        self._metrics.measure(WorkerStats(self._engine, legs, health, leg_metrics).read)
        dropped = DroppedMessages(self._engine, self._metrics)
        self._tasks.append(asyncio.create_task(dropped.watch(), name="dropped-messages"))

    async def _leave(self, server: RpcServer) -> None:
        """Report NOT_SERVING from here on, even when the engine is healthy."""
        self._is_leaving = True
        await server.set_serving(False)

    async def _report_health(self, trouble: str | None) -> None:
        assert self._server is not None, "health before start()"
        if not self._is_leaving:
            await self._server.set_serving(trouble is None)

    async def _finish_legs(self, legs: Legs) -> bool:
        """Close admission and wait for the open legs. Returns whether all ended within the drain timeout."""
        legs.close_admission()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await legs.wait_none()
        except TimeoutError:
            timeout_s = self._config.drain_timeout_s
            log.error("drain timed out after %g s: aborting %d open legs", timeout_s, legs.open_count)
            return False
        return True

    async def _until_legs_end(self, legs: Legs) -> None:
        await self._finish_legs(legs)

    async def _pass_canary(self) -> None:
        try:
            async with asyncio.timeout(self._config.canary_timeout_s):
                await self._engine.canary()
        except TimeoutError:
            raise StartError(f"engine canary timed out after {self._config.canary_timeout_s:g} s") from None
        except EngineFailed as problem:
            raise StartError(f"engine canary failed: {problem}") from None

    async def _register(self, registration: Registration) -> None:
        await registration.start()
        trouble = await _first(registration.wait_registered(), registration.wait_fenced(), self._engine.wait_failed())
        if trouble is not None:
            raise StartError(trouble)

    async def _wait_drain_requested(self) -> None:
        await self._drain_requested.wait()

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
    """The result of the coroutine that ends first; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
