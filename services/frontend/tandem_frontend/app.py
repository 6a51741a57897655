"""Composition root of the frontend: creates its parts, and starts and stops them in order.

Start: tokenizer, port, metrics, parser host, registry view, server, health (SERVING while a worker is known), and last
its own registration, which nothing waits for, and the batches. Drain: DRAINING in the registry and NOT_SERVING while
requests are still accepted -> stop batches -> settle -> close admission -> wait for the open requests -> deregister.
Stop: batches, registration, server, and then what the start opened, in reverse order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import tandem
from tandem.api.admin.v1.admin_service_pb2_grpc import (
    add_FrontendAdminServiceServicer_to_server,
    add_ProfileServiceServicer_to_server,
)
from tandem.api.frontend.v1.anthropic_service_pb2_grpc import add_AnthropicServiceServicer_to_server
from tandem.api.frontend.v1.batch_service_pb2_grpc import add_BatchServiceServicer_to_server
from tandem.api.frontend.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from tandem.api.frontend.v1.openai_service_pb2_grpc import add_OpenAiServiceServicer_to_server
from tandem.api.frontend.v1.quota_service_pb2_grpc import add_QuotaServiceServicer_to_server
from tandem.clock import epoch_now, monotonic
from tandem.discovery import Registration
from tandem.discovery.advertised import log_doubts
from tandem.discovery.watches import FrontendWatch
from tandem.domain.frontend import Frontend, default_frontend_id
from tandem.domain.network_address import join_address
from tandem.domain.worker import WorkerState
from tandem.observability.cpu_profile import CpuProfiler
from tandem.observability.line_log import LineLog
from tandem.observability.logs import log_request
from tandem.observability.metric_catalog import Emitter
from tandem.observability.metrics import Measure, Metrics, Reading, Together, open_metrics
from tandem.observability.profiles import Profiles
from tandem.observability.request_metrics import RequestMetrics
from tandem.observability.request_trace import RequestTrace
from tandem.observability.span_export import export_spans, resource
from tandem.observability.trace_store import TraceStore
from tandem.output_parsers import Parsers
from tandem.rpc.http2.limits import STREAMS_MAX
from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.profile_servicer import SERVICE_NAME as PROFILE_SERVICE_NAME
from tandem.rpc.profile_servicer import ProfileServicer
from tandem.service.background import BackgroundTasks
from tandem.service.loop_load import LoopLoad
from tandem_frontend.admin.local_requests import LocalRequests
from tandem_frontend.admin.servicer import SERVICE_NAME as ADMIN_SERVICE_NAME
from tandem_frontend.admin.servicer import FrontendAdminServicer
from tandem_frontend.admin.stats import RequestStats
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.controller import Admission
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.admission.quota_exchange import SERVICE_NAME as QUOTA_SERVICE_NAME
from tandem_frontend.admission.quota_exchange import QuotaExchange, QuotaServicer
from tandem_frontend.admission.quotas import Quotas
from tandem_frontend.admission.shares import TenantRates
from tandem_frontend.anthropic.servicer import SERVICE_NAME as ANTHROPIC_SERVICE_NAME
from tandem_frontend.anthropic.servicer import AnthropicServicer
from tandem_frontend.batches.part import Batches
from tandem_frontend.batches.servicer import SERVICE_NAME as BATCH_SERVICE_NAME
from tandem_frontend.call_usage import TenantMetrics, UsageSink
from tandem_frontend.config import PROGRAM, FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.servicer import SERVICE_NAME as OPENAI_SERVICE_NAME
from tandem_frontend.openai.servicer import OpenAiServicer
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.cache_salt import CacheSharing
from tandem_frontend.preparation.sampling import read_defaults
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.processes.membership import Membership
from tandem_frontend.processes.siblings import Siblings
from tandem_frontend.readiness import Readiness
from tandem_frontend.registered_models import check_models
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.servicer import SERVICE_NAME, InferenceServicer
from tandem_frontend.tenancy import Tenancy

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5


class FrontendApp:
    """A serving frontend, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(
        self,
        config: FrontendConfig,
        address: str,
        metrics: Metrics,
        server: Http2RpcServer,
        admission: Admission,
        fleet: Fleet,
        readiness: Readiness,
        registration: Registration | None,
        batches: Batches,
    ) -> None:
        """`registration` is None in one of several processes: the parent process has it."""
        self.address = address
        """host:port of the frontend."""
        self.fleet = fleet
        self._config = config
        self._metrics = metrics
        self._server = server
        self._admission = admission
        self._readiness = readiness
        self._registration = registration
        self._batches = batches

    @classmethod
    @asynccontextmanager
    async def open(cls, config: FrontendConfig, membership: Membership | None = None) -> AsyncIterator[FrontendApp]:
        """Start a frontend, and stop it on exit. Enters when it has a view; waits for a registry without a timeout.

        Args:
            config: its settings.
            membership: of one of several processes; the parent process then has the port and the registration.

        Raises:
            StartError: the port is in use, a TLS file is unusable, the model directory has no readable tokenizer,
                SGLang does not know the configured parsers, or the registry's frontends serve another model.
        """
        async with AsyncExitStack() as stack:
            model = await _open_model(config, stack)
            server = _bind(config, membership, model, stack)
            names = _Names.of(config, membership, server.port)
            metrics = await _open_metrics(config, membership, names.instance, stack)
            traces = _open_traces(config, names.instance, stack)
            stats = RequestStats(traces)
            parsers = await _open_parsers(config, stack)
            load = LoopLoad()
            capacity = Capacity(config.served_name, monotonic, config.no_worker_wait_s)
            backlog = PrefillBacklog(config.served_name, config.prefill_queue_s)
            share = BackgroundShare(config.batch_rows_max, config.batch_rows_per_live_request, monotonic, capacity)
            admission = _make_admission(config, capacity, backlog, load, server, share)
            readiness = Readiness(server, config.served_name)
            fleet = Fleet(
                config, names.instance, model, (capacity, readiness), backlog, admission.reevaluate_soon, metrics
            )
            coalescing = Coalescing(config.coalesce_ms / 1_000, load)
            exchange = _make_exchange(config, membership, names)
            stack.push_async_callback(exchange.close)
            generation = Generation(
                model, admission, fleet.execution, traces, coalescing, tells_prompts=config.trace_prompts,
                tenancy=_open_tenancy(config, exchange, metrics, stack),
            )  # fmt: skip
            if metrics.is_on:
                metrics.measure(_gauges(server, admission, fleet.prefixes))
                traces.sinks.append(RequestMetrics(metrics, config.served_name))
            await stack.enter_async_context(fleet.connected())
            own = LocalRequests(traces, stats, lambda: admission.waiting_count)
            inference = InferenceServicer(generation, model, fleet.watch.workers, config.session_header)
            server.add(SERVICE_NAME, partial(add_InferenceServiceServicer_to_server, inference))
            bodies = BodyChecker(model.tokenizer.context_tokens_max, config.tenant_share)
            stack.push_async_callback(bodies.close)
            openai = OpenAiServicer(
                generation,
                model,
                fleet.watch.workers,
                parsers,
                bodies,
                config.session_header,
                comment_s=config.stream_comment_s,
            )
            server.add(OPENAI_SERVICE_NAME, partial(add_OpenAiServiceServicer_to_server, openai))
            anthropic = AnthropicServicer(
                generation,
                model,
                fleet.watch.workers,
                parsers,
                bodies,
                config.session_header,
                comment_s=config.stream_comment_s,
            )
            server.add(ANTHROPIC_SERVICE_NAME, partial(add_AnthropicServiceServicer_to_server, anthropic))
            batches = await Batches.open(
                config,
                openai.answer,
                admission,
                share,
                metrics,
                config.request_bytes(model.tokenizer.context_tokens_max),
            )
            server.add(BATCH_SERVICE_NAME, partial(add_BatchServiceServicer_to_server, batches.servicer))
            _add_internal(server, config, membership, own, exchange)
            tasks = await stack.enter_async_context(BackgroundTasks())
            tasks.start(stats.keep_looking(), "figures")
            await _serve(server, membership, own, exchange, stack)
            await fleet.watch.wait_live()
            if membership is None:
                await check_models(config, names.frontend_id, names.address)
            await readiness.open()
            tasks.start(readiness.keep(), "readiness")
            tasks.start(exchange.follow(partial(_frontend_list, config)), "quotas")
            registration = None if membership is not None else await _register(config, names, stack)
            stack.push_async_callback(batches.stop)
            batches.start()
            yield cls(config, names.address, metrics, server, admission, fleet, readiness, registration, batches)

    @property
    def metrics_port(self) -> int:
        """Port of the Prometheus endpoint; 0: none."""
        return self._metrics.port

    async def drain(self) -> bool:
        """Drain in the order given above. Returns whether every request ended within drain_timeout_s."""
        if self._registration is not None:
            self._metrics.count("tandem.drains")
            # Do not wait for an unreachable registry.
            await self._registration.set_state(WorkerState.DRAINING, 1.0 if self._registration.registered else 0.0)
        await self._readiness.leave()
        await self._batches.stop()
        await asyncio.sleep(self._config.drain_settle_s)
        try:
            return await self._finish_requests()
        finally:
            if self._registration is not None:
                await self._registration.close()

    async def _finish_requests(self) -> bool:
        """Close admission and wait for the open requests. Returns whether all ended within drain_timeout_s."""
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

    async def wait_finished(self) -> str | None:
        """Never returns: a frontend ends only when it is asked to."""
        await asyncio.get_running_loop().create_future()
        raise AssertionError("a future without a reference cannot be done")


@dataclass(frozen=True, slots=True)
class _Names:
    """How others call this frontend."""

    address: str
    frontend_id: str
    instance: str
    """Unique name of this process: for workers, in traces and in pushed metrics."""

    @classmethod
    def of(cls, config: FrontendConfig, membership: Membership | None, port: int) -> _Names:
        if membership is not None:
            identity = membership.identity
            return cls(identity.address, identity.frontend_id, identity.instance)
        address = join_address(config.reachable_host, port)
        frontend_id = config.frontend_id or default_frontend_id(address)
        return cls(address, frontend_id, frontend_id)


async def _open_model(config: FrontendConfig, stack: AsyncExitStack) -> ServedModel:
    tokenizer = await asyncio.to_thread(Tokenizer.open, config.model, processes=config.long_prompt_processes)
    stack.push_async_callback(tokenizer.close)
    return ServedModel(config.served_name, tokenizer, read_defaults(config.model))


def _bind(
    config: FrontendConfig, membership: Membership | None, model: ServedModel, stack: AsyncExitStack
) -> Http2RpcServer:
    """The server; its port is bound, but it serves no calls yet."""
    server = Http2RpcServer(
        request_bytes_max=config.request_bytes(model.tokenizer.context_tokens_max),
        tls=config.tls,
        # One client may open as many requests as are allowed over one connection, and health streams beside them.
        streams_max=max(STREAMS_MAX, 2 * config.open_requests_max),
    )
    stack.push_async_callback(server.stop, STOP_GRACE_S)
    if membership is None:
        server.bind(config.host, config.port)
    return server


async def _open_metrics(
    config: FrontendConfig, membership: Membership | None, instance: str, stack: AsyncExitStack
) -> Metrics:
    together = None if membership is None else Together(path=membership.identity.metrics_path)
    metrics = open_metrics(config, Emitter.FRONTEND, PROGRAM, config.tls, together=together)
    stack.push_async_callback(metrics.stop)
    await metrics.start(instance)
    return metrics


def _open_traces(config: FrontendConfig, instance: str, stack: AsyncExitStack) -> TraceStore[RequestTrace]:
    """The request traces; their spans are exported where a collector is configured."""
    traces: TraceStore[RequestTrace] = TraceStore([log_request], closed_kept=config.timelines_kept)
    spans = export_spans(traces, config.otlp_endpoint, config.trace_sample_ratio, resource("frontend", instance))
    if spans is not None:
        stack.push_async_callback(asyncio.to_thread, spans.close)
    return traces


async def _open_parsers(config: FrontendConfig, stack: AsyncExitStack) -> Parsers | None:
    """None: neither tool calls nor reasoning are parsed."""
    if config.tool_parser is None and config.reasoning_parser is None:
        return None
    parsers = Parsers(config.model, tool_parser=config.tool_parser, reasoning_parser=config.reasoning_parser)
    stack.push_async_callback(parsers.stop)
    await parsers.start()
    return parsers


def _make_admission(
    config: FrontendConfig,
    capacity: Capacity,
    backlog: PrefillBacklog,
    load: LoopLoad,
    server: Http2RpcServer,
    share: BackgroundShare,
) -> Admission:
    return Admission(
        config.open_requests_max,
        capacity,
        monotonic,
        load,
        config.overload_lag_s,
        lambda: server.unread_calls,
        backlog,
        config.prefill_queue_s,
        tenant_share=config.tenant_share,
        rates=TenantRates(config.tenant_requests_per_second, config.tenant_requests_burst, monotonic),
        background=share,
    )


def _gauges(server: Http2RpcServer, admission: Admission, prefixes: PrefixIndex | None) -> Measure:
    async def read() -> list[Reading]:
        readings = [
            Reading("tandem.connections.open", server.connection_count),
            Reading("tandem.requests.open", admission.open_count),
            Reading("tandem.queue.depth", admission.waiting_count),
        ]
        if prefixes is not None:
            readings += [
                Reading("tandem.prefix.blocks", prefixes.block_count),
                Reading("tandem.prefix.workers", prefixes.trusted_count, {"tandem.state": "trusted"}),
                Reading("tandem.prefix.workers", prefixes.suspected_count, {"tandem.state": "suspected"}),
            ]
        return readings

    return read


def _add_internal(
    server: Http2RpcServer,
    config: FrontendConfig,
    membership: Membership | None,
    own: LocalRequests,
    exchange: QuotaExchange,
) -> None:
    """For operators timelines and stats of all processes of this frontend and profiles of this one; for other frontends
    what tenants have used.
    """
    admin = FrontendAdminServicer(own, Siblings({}) if membership is None else membership.siblings)
    server.add(ADMIN_SERVICE_NAME, partial(add_FrontendAdminServiceServicer_to_server, admin))
    number = None if membership is None else membership.identity.number
    profiles = ProfileServicer(Profiles(CpuProfiler(), enabled=config.admin_enabled, process=number))
    server.add(PROFILE_SERVICE_NAME, partial(add_ProfileServiceServicer_to_server, profiles))
    quotas = QuotaServicer(exchange, own_only=False)
    server.add(QUOTA_SERVICE_NAME, partial(add_QuotaServiceServicer_to_server, quotas))


def _make_exchange(config: FrontendConfig, membership: Membership | None, names: _Names) -> QuotaExchange:
    """Of the quotas of this process, with those of all other processes of the cluster."""
    quotas = Quotas(monotonic, f"{names.instance}@{epoch_now()}")
    paths = () if membership is None else membership.identity.sibling_paths.values()
    return QuotaExchange(quotas, [f"unix:{path}" for path in paths], config.tls, frontend_id=names.frontend_id)


def _open_tenancy(config: FrontendConfig, exchange: QuotaExchange, metrics: Metrics, stack: AsyncExitStack) -> Tenancy:
    counts = TenantMetrics(metrics)
    sinks: list[UsageSink] = [counts] if metrics.is_on else []
    if config.usage_log is not None:
        lines = LineLog(config.usage_log)
        stack.push_async_callback(asyncio.to_thread, lines.close)
        sinks.append(lambda entry: lines.write(entry.as_line()))
    return Tenancy(
        CacheSharing(config.cache_sharing),
        exchange.quotas,
        sinks,
        on_quota=exchange.begin,
        on_refused=counts.refused,
    )


@asynccontextmanager
async def _frontend_list(config: FrontendConfig) -> AsyncIterator[FrontendWatch]:
    watch = FrontendWatch(config.registry, tls=config.tls)
    await watch.start()
    try:
        yield watch
    finally:
        await watch.close()


async def _serve(
    server: Http2RpcServer,
    membership: Membership | None,
    own: LocalRequests,
    exchange: QuotaExchange,
    stack: AsyncExitStack,
) -> None:
    """Accept calls, and in one of several processes those of the siblings too."""
    if membership is not None:
        stack.push_async_callback(membership.close)
    # Again, because a server that serves stops before the parts that serve its calls.
    stack.push_async_callback(server.stop, STOP_GRACE_S)
    await server.serve()
    if membership is not None:
        await membership.open(server, own, exchange)


async def _register(config: FrontendConfig, names: _Names, stack: AsyncExitStack) -> Registration:
    """Register, so that edges and tools can discover this frontend. Clients that know its address need no entry."""
    frontend = Frontend(
        frontend_id=names.frontend_id,
        epoch=epoch_now(),
        address=names.address,
        model=config.served_name,
        release=tandem.__version__,
    )
    registration = Registration(config.registry, frontend, tls=config.tls, may_be_fenced=False)
    stack.push_async_callback(registration.close)
    await log_doubts(frontend.address, config.registry)
    await registration.start()
    return registration
