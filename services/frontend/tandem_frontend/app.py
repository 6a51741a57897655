"""Composition root of the frontend: creates its parts, and starts and stops them in order.

Start: tokenizer, metrics, parser host, registry view, server, health SERVING, and last its own registration, which
nothing waits for. Drain: DRAINING in the registry and NOT_SERVING while requests are still accepted -> settle -> close
admission -> wait for the open requests -> deregister. Stop: server, encoders of long prompts, parser host, view,
channels, metrics.
"""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial

import tandem
from tandem.api.admin.v1.admin_service_pb2_grpc import (
    add_FrontendAdminServiceServicer_to_server,
    add_ProfileServiceServicer_to_server,
)
from tandem.api.frontend.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from tandem.api.frontend.v1.openai_service_pb2_grpc import add_OpenAiServiceServicer_to_server
from tandem.client.load_watch import LoadWatch
from tandem.client.step_calls import WorkerCalls
from tandem.clock import epoch_now, monotonic
from tandem.discovery import Registration, WorkerWatch
from tandem.domain.frontend import Frontend, default_frontend_id
from tandem.domain.worker import EngineLoad, Start, Worker, WorkerState
from tandem.observability.cpu_profile import CpuProfiler
from tandem.observability.logs import log_request
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Reading, Together, open_metrics
from tandem.observability.profiles import Profiles
from tandem.observability.request_metrics import RequestMetrics
from tandem.observability.request_trace import RequestTrace
from tandem.observability.span_export import SpanExport, export_spans, resource
from tandem.observability.trace_store import TraceStore
from tandem.output_parsers import Parsers
from tandem.rpc.channels import Channels
from tandem.rpc.http2.limits import STREAMS_MAX
from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.profile_servicer import SERVICE_NAME as PROFILE_SERVICE_NAME
from tandem.rpc.profile_servicer import ProfileServicer
from tandem.service.awake_timers import AwakeTimers
from tandem.service.loop_load import LoopLoad
from tandem_frontend.admin.local_requests import LocalRequests
from tandem_frontend.admin.servicer import SERVICE_NAME as ADMIN_SERVICE_NAME
from tandem_frontend.admin.servicer import FrontendAdminServicer
from tandem_frontend.admin.stats import RequestStats
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.config import PROGRAM, FrontendConfig
from tandem_frontend.execution.dispatch import Dispatch
from tandem_frontend.execution.link_leg import Bounds
from tandem_frontend.execution.request_stream import ExecutionDeps
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.openai.servicer import SERVICE_NAME as OPENAI_SERVICE_NAME
from tandem_frontend.openai.servicer import OpenAiServicer
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.sampling import read_defaults
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.processes.membership import Membership
from tandem_frontend.processes.siblings import Siblings
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.router import RecentRefusals, Routes
from tandem_frontend.routing.worker_health import WorkerHealth
from tandem_frontend.servicer import SERVICE_NAME, InferenceServicer

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5


class FrontendApp:
    """The frontend as `tandem.service.process` runs it."""

    def __init__(self, config: FrontendConfig, membership: Membership | None = None) -> None:
        """`membership`: of one of several processes; the parent process then has the port and the registration."""
        self._config = config
        self._membership = membership
        self._siblings = Siblings({}) if membership is None else membership.siblings
        self._traces: TraceStore[RequestTrace] = TraceStore([log_request], closed_kept=config.timelines_kept)
        self._stats = RequestStats(self._traces)
        self._stats_task: asyncio.Task[None] | None = None
        self._spans: SpanExport | None = None
        self._tokenizer: Tokenizer | None = None
        self._admission: Admission | None = None
        self._execution: ExecutionDeps | None = None
        self._loads: LoadWatch | None = None
        self._links: WorkerLinks | None = None
        self._timers = AwakeTimers()
        self._capacity = Capacity(config.served_name)
        self._routes: Routes | None = None
        together = None if membership is None else Together(path=membership.identity.metrics_path)
        self._metrics = open_metrics(config, Emitter.FRONTEND, PROGRAM, config.tls, together=together)
        self._server: Http2RpcServer | None = None
        self._watch: WorkerWatch | None = None
        self._channels = Channels(config.tls)
        self._registration: Registration | None = None
        self._health = WorkerHealth(self._channels, self._timers)
        self._breakers = CircuitBreakers(monotonic, random.SystemRandom(), self._health.unhealthy)
        self._known_starts: set[tuple[str, Start]] = set()
        """(address, start) of all workers of the view."""
        self._parsers: Parsers | None = None
        """None: neither tool calls nor reasoning are parsed."""
        if config.tool_parser is not None or config.reasoning_parser is not None:
            self._parsers = Parsers(
                config.model, tool_parser=config.tool_parser, reasoning_parser=config.reasoning_parser
            )

    @property
    def address(self) -> str:
        """host:port of the frontend, once started."""
        if self._membership is not None:
            return self._membership.identity.address
        assert self._server is not None, "address before start()"
        return f"{self._config.reachable_host}:{self._server.port}"

    @property
    def _frontend_id(self) -> str:
        return self._config.frontend_id or default_frontend_id(self.address)

    @property
    def _instance(self) -> str:
        """Unique name of this process: for workers, in traces and in pushed metrics."""
        return self._frontend_id if self._membership is None else self._membership.identity.instance

    @property
    def metrics_port(self) -> int:
        """Port of the Prometheus endpoint, once started; 0: none."""
        return self._metrics.port

    async def start(self) -> None:
        """Return when it serves; waits for a registry without a timeout.

        Raises:
            StartError: the port is in use, a TLS file is unusable, the model directory has no readable tokenizer, or
                SGLang does not know the configured parsers.
        """
        config = self._config
        tokenizer = self._tokenizer = await asyncio.to_thread(
            Tokenizer.open, config.model, processes=config.long_prompt_processes
        )
        request_bytes_max = config.request_bytes(tokenizer.context_tokens_max)
        server = self._server = Http2RpcServer(
            request_bytes_max=request_bytes_max,
            tls=config.tls,
            # One client may open as many requests as are allowed over one connection, and health streams beside them.
            streams_max=max(STREAMS_MAX, 2 * config.open_requests_max),
        )
        if self._membership is None:
            server.bind(config.host, config.port)
        self._spans = export_spans(
            self._traces, config.otlp_endpoint, config.trace_sample_ratio, resource("frontend", self._instance)
        )
        await self._metrics.start(self._instance)
        if self._parsers is not None:
            await self._parsers.start()
        model = ServedModel(config.served_name, tokenizer, read_defaults(config.model))
        watch = self._watch = WorkerWatch(config.registry, tls=config.tls, on_change=self._follow)
        self._loads = LoadWatch(self._channels, on_change=self._note_load)
        load = LoopLoad()
        admission = self._admission = Admission(
            config.open_requests_max,
            self._capacity,
            monotonic,
            load,
            config.overload_lag_s,
            lambda: server.unread_call_count,
        )
        await self._health.start()
        # Seeded by the system, so that no two processes choose alike; no value is a secret.
        rng = random.Random()  # noqa: S311 -- see above
        refusals = RecentRefusals(monotonic)
        routes = self._routes = Routes(model, watch.workers, self._health.unhealthy, refusals, self._breakers, rng)
        bounds = Bounds(config.leg_accept_timeout_s, config.leg_silence_timeout_s)
        links = self._links = WorkerLinks(
            self._instance, WorkerCalls(self._channels), bounds, self._timers, self._health.check
        )
        execution = self._execution = ExecutionDeps(
            routes, refusals, self._breakers, Dispatch(links, rng), monotonic, rng
        )
        coalescing = Coalescing(config.coalesce_ms / 1_000, load)
        generation = Generation(
            model, admission, execution, self._traces, coalescing, tells_prompts=config.trace_prompts
        )
        if self._metrics.is_on:
            self._metrics.measure(self._read)
            self._traces.sinks.append(RequestMetrics(self._metrics, config.served_name))
        await watch.start()
        servicer = InferenceServicer(generation, model, watch.workers)
        server.add(SERVICE_NAME, partial(add_InferenceServiceServicer_to_server, servicer))
        openai = OpenAiServicer(generation, model, watch.workers, self._parsers, config.open_requests_max)
        server.add(OPENAI_SERVICE_NAME, partial(add_OpenAiServiceServicer_to_server, openai))
        own = LocalRequests(self._traces, self._stats, lambda: admission.waiting_count)
        admin = FrontendAdminServicer(own, self._siblings)
        server.add(ADMIN_SERVICE_NAME, partial(add_FrontendAdminServiceServicer_to_server, admin))
        self._stats_task = asyncio.create_task(self._stats.keep_looking(), name="figures")
        number = None if self._membership is None else self._membership.identity.number
        profiles = ProfileServicer(Profiles(CpuProfiler(), enabled=config.admin_enabled, process=number))
        server.add(PROFILE_SERVICE_NAME, partial(add_ProfileServiceServicer_to_server, profiles))
        await server.serve()
        if self._membership is not None:
            await self._membership.open(server, own)
        await watch.wait_live()
        await server.set_serving(True)
        if self._membership is None:
            await self._register()

    async def drain(self) -> bool:
        """Drain in the order given above. Returns whether every request ended within drain_timeout_s."""
        assert self._server is not None, "drain() before start()"
        if self._registration is not None:
            self._metrics.count("tandem.drains")
            # Do not wait for an unreachable registry.
            await self._registration.set_state(WorkerState.DRAINING, 1.0 if self._registration.registered else 0.0)
        await self._server.set_serving(False)
        await asyncio.sleep(self._config.drain_settle_s)
        try:
            return await self._finish_requests()
        finally:
            if self._registration is not None:
                await self._registration.close()

    async def _finish_requests(self) -> bool:
        """Close admission and wait for the open requests. Returns whether all ended within drain_timeout_s."""
        assert self._admission is not None, "drain() before start()"
        self._admission.close()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._admission.wait_none()
        except TimeoutError:
            open_count = self._admission.open_count
            log.error(
                "drain timeout (%g s): %d requests are still open and are aborted now",
                self._config.drain_timeout_s, open_count,
            )  # fmt: skip
            return False
        return True

    async def stop(self) -> None:
        """Release everything, also after a failed `start`."""
        if self._stats_task is not None:
            self._stats_task.cancel()
        if self._registration is not None:
            await self._registration.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        if self._membership is not None:
            await self._membership.close()
        if self._tokenizer is not None:
            await self._tokenizer.close()
        if self._parsers is not None:
            await self._parsers.stop()
        if self._watch is not None:
            await self._watch.close()
        if self._loads is not None:
            await self._loads.close()
        if self._links is not None:
            await self._links.close()
        self._timers.close()
        await self._health.close()
        await self._channels.close()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        await self._metrics.stop()

    async def wait_finished(self) -> str | None:
        """Never returns: a frontend ends only when it is asked to."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("a future without a reference cannot be done")

    async def _register(self) -> None:
        """Register, so that edges and tools can discover this frontend. Clients that know its address need no entry."""
        config = self._config
        frontend = Frontend(
            frontend_id=self._frontend_id,
            epoch=epoch_now(),
            address=self.address,
            model=config.served_name,
            release=tandem.__version__,
        )
        self._registration = Registration(config.registry, frontend, tls=config.tls, may_be_fenced=False)
        await self._registration.start()

    def _follow(self, workers: tuple[Worker, ...]) -> None:
        """Pass a new view on to every part, and close the channels to workers that were removed or restarted.

        A restarted worker at the same address gets a new channel: the old one may be in its reconnect back-off.
        """
        starts = {(worker.address, worker.start) for worker in workers}
        self._channels.keep_only({address for address, _ in starts & self._known_starts})
        self._known_starts = starts
        if self._links is not None:
            self._links.follow(workers)
        self._health.follow(workers)
        self._breakers.follow(workers)
        self._capacity.follow(workers)
        if self._routes is not None:
            self._routes.follow(workers)
        if self._loads is not None:
            self._loads.follow(workers)
        if self._execution is not None:
            self._execution.notice(workers)
        self._reevaluate()

    def _note_load(self, start: Start, load: EngineLoad | None) -> None:
        self._capacity.note(start, load)
        self._reevaluate()

    async def _read(self) -> list[Reading]:
        """Values of the gauges."""
        assert self._admission is not None, "gauges are read after start()"
        assert self._server is not None, "gauges are read after start()"
        return [
            Reading("tandem.connections.open", self._server.connection_count),
            Reading("tandem.requests.open", self._admission.open_count),
            Reading("tandem.queue.depth", self._admission.waiting_count),
        ]

    def _reevaluate(self) -> None:
        """Workers or their load have changed: a queued request may fit now."""
        if self._admission is not None:
            self._admission.reevaluate_soon()
