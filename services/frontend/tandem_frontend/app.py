"""Composition root of the frontend: creates its parts, and starts and stops them in order.

Start: the own model's tokenizer, port, metrics, that model, server, registry view, the models of the view, health
(SERVING while a worker is known), and last its own registration, which nothing waits for, and the batches. Drain:
DRAINING in the registry and NOT_SERVING while requests are still accepted -> stop batches -> settle -> close admission
-> wait for the open requests -> deregister. Stop: batches, registration, server, and then what the start opened, in
reverse order.
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
from tandem.errors import ModelNotFound
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
from tandem_frontend.admission.open_requests import OpenRequests
from tandem_frontend.admission.quota_exchange import SERVICE_NAME as QUOTA_SERVICE_NAME
from tandem_frontend.admission.quota_exchange import QuotaExchange, QuotaServicer
from tandem_frontend.admission.quotas import Quotas
from tandem_frontend.admission.shares import TenantRates
from tandem_frontend.anthropic.servicer import SERVICE_NAME as ANTHROPIC_SERVICE_NAME
from tandem_frontend.anthropic.servicer import AnthropicServicer
from tandem_frontend.batches.part import Batches
from tandem_frontend.batches.servicer import SERVICE_NAME as BATCH_SERVICE_NAME
from tandem_frontend.call_usage import TenantMetrics, UsageSink
from tandem_frontend.config import CONTEXT_TOKENS, PROGRAM, FrontendConfig
from tandem_frontend.fleet import Fleet
from tandem_frontend.models.catalog import ModelCatalog
from tandem_frontend.models.model_pipeline import Models
from tandem_frontend.models.opening import ModelOpener, Shared, open_tokenizer
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.servicer import SERVICE_NAME as OPENAI_SERVICE_NAME
from tandem_frontend.openai.servicer import OpenAiServicer
from tandem_frontend.preparation.cache_salt import CacheSharing
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.processes.membership import Membership
from tandem_frontend.processes.siblings import Siblings
from tandem_frontend.readiness import Readiness
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.servicer import SERVICE_NAME, InferenceServicer
from tandem_frontend.tenancy import Tenancy

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5
UNKNOWN_MODEL = {"tandem.reason": ModelNotFound.reason}


class FrontendApp:
    """A serving frontend, as `tandem.service.process` runs it. `open` makes one."""

    def __init__(
        self,
        config: FrontendConfig,
        address: str,
        metrics: Metrics,
        server: Http2RpcServer,
        requests: OpenRequests,
        fleet: Fleet,
        models: ModelCatalog,
        readiness: Readiness,
        registration: Registration | None,
        batches: Batches,
        console_port: int = 0,
    ) -> None:
        """`registration` is None in one of several processes: the parent process has it."""
        self.address = address
        """host:port of the frontend."""
        self.fleet = fleet
        self.models = models
        self.console_port = console_port
        """Port of the console; 0: there is none."""
        self._config = config
        self._metrics = metrics
        self._server = server
        self._requests = requests
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
                or SGLang does not know the configured parsers.
        """
        async with AsyncExitStack() as stack:
            own = await _open_own(config, stack)
            context_tokens = CONTEXT_TOKENS if own is None else own.tokenizer.context_tokens_max
            server = _bind(config, membership, context_tokens, stack)
            names = _Names.of(config, membership, server.port)
            metrics = await _open_metrics(config, membership, names.instance, stack)
            traces = _open_traces(config, names.instance, stack)
            stats = RequestStats(traces)
            load = LoopLoad()
            share = BackgroundShare(config.batch_rows_max, config.batch_rows_per_live_request, monotonic)
            requests = _make_requests(config, load, server, share)
            readiness = Readiness(server)
            fleet = Fleet(config, names.instance)
            exchange = _make_exchange(config, membership, names)
            stack.push_async_callback(exchange.close)
            tenancy = _open_tenancy(config, exchange, metrics, stack)
            coalescing = Coalescing(config.coalesce_ms / 1_000, load)
            opener = ModelOpener(Shared(config, fleet, requests, traces, coalescing, tenancy, metrics), own)
            catalog = ModelCatalog(
                opener.open, requests, config.naming_rules, config.model_linger_s, readiness.note,
                lambda: metrics.count("tandem.requests.refused", attributes=UNKNOWN_MODEL),
            )  # fmt: skip
            if metrics.is_on:
                metrics.measure(_gauges(server, requests, catalog))
                recorded = RequestMetrics(metrics)
                traces.sinks.append(recorded)
                traces.part_sinks.append(recorded.part)
            await stack.enter_async_context(fleet.connected())
            stack.push_async_callback(catalog.close)
            if own is not None:
                await catalog.keep(own.name)
            own_requests = LocalRequests(traces, stats, lambda: waiting_count(catalog))
            bodies = BodyChecker(context_tokens, config.tenant_share)
            stack.push_async_callback(bodies.close)
            catalog.on_open = lambda opened: bodies.allow(opened.pipeline.model.tokenizer.context_tokens_max)
            openai = _add_public(server, config, catalog, bodies)
            batches = await Batches.open(
                config, openai.answer, catalog, share, metrics, config.request_bytes(context_tokens)
            )
            server.add(BATCH_SERVICE_NAME, partial(add_BatchServiceServicer_to_server, batches.servicer))
            _add_internal(server, config, membership, own_requests, exchange)
            tasks = await stack.enter_async_context(BackgroundTasks())
            tasks.start(stats.keep_looking(), "figures")
            await _serve(server, membership, own_requests, exchange, stack)
            console_port = await _open_console(config, fleet, names, stack)
            fleet.on_view = catalog.follow
            await fleet.watch.wait_live()
            catalog.follow(fleet.watch.workers())
            await catalog.wait_settled()
            await readiness.open()
            tasks.start(readiness.keep(), "readiness")
            tasks.start(exchange.follow(partial(_frontend_list, config)), "quotas")
            registration = None if membership is not None else await _register(config, names, stack)
            stack.push_async_callback(batches.stop)
            batches.start()
            yield cls(
                config, names.address, metrics, server, requests, fleet, catalog, readiness, registration, batches,
                console_port,
            )  # fmt: skip

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
        self._requests.close()
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._requests.wait_none()
        except TimeoutError:
            open_count = self._requests.open_count
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


async def _open_own(config: FrontendConfig, stack: AsyncExitStack) -> ServedModel | None:
    """The model of the setting `model`: its files are read before anything else starts."""
    if config.model is None or config.served_name is None:
        return None
    return await open_tokenizer(config.served_name, config.model, config, stack)


def _bind(
    config: FrontendConfig, membership: Membership | None, context_tokens_max: int, stack: AsyncExitStack
) -> Http2RpcServer:
    """The server; its port is bound, but it serves no calls yet."""
    server = Http2RpcServer(
        request_bytes_max=config.request_bytes(context_tokens_max),
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


def _make_requests(
    config: FrontendConfig, load: LoopLoad, server: Http2RpcServer, share: BackgroundShare
) -> OpenRequests:
    return OpenRequests(
        config.open_requests_max,
        monotonic,
        load,
        config.overload_lag_s,
        lambda: server.unread_calls,
        tenant_share=config.tenant_share,
        rates=TenantRates(config.tenant_requests_per_second, config.tenant_requests_burst, monotonic),
        background=share,
    )


def waiting_count(catalog: ModelCatalog) -> int:
    """Requests in the queues of all models."""
    return sum(opened.admission.waiting_count for opened in catalog.opened)


def _gauges(server: Http2RpcServer, requests: OpenRequests, catalog: ModelCatalog) -> Measure:
    async def read() -> list[Reading]:
        readings = [
            Reading("tandem.connections.open", server.connection_count),
            Reading("tandem.models", len(catalog.opened), {"tandem.state": "served"}),
            Reading("tandem.models", catalog.refused_count, {"tandem.state": "refused"}),
        ]
        for opened in catalog.opened:
            about = {"gen_ai.request.model": opened.pipeline.model.name}
            readings.append(Reading("tandem.requests.open", opened.admission.open_count, about))
            readings.append(Reading("tandem.queue.depth", opened.admission.waiting_count, about))
        # Long responses that are complete and unread belong to no model any more.
        readings.append(Reading("tandem.requests.open", requests.unread_count, {"gen_ai.request.model": ""}))
        indexes = [opened.fleet.prefixes for opened in catalog.opened]
        known = [index for index in indexes if index is not None]
        if known:
            trusted, suspected = sum(one.trusted_count for one in known), sum(one.suspected_count for one in known)
            readings += [
                Reading("tandem.prefix.blocks", sum(one.block_count for one in known)),
                Reading("tandem.prefix.workers", trusted, {"tandem.state": "trusted"}),
                Reading("tandem.prefix.workers", suspected, {"tandem.state": "suspected"}),
            ]
        return readings

    return read


def _add_public(server: Http2RpcServer, config: FrontendConfig, models: Models, bodies: BodyChecker) -> OpenAiServicer:
    """What clients call. Returns what the rows of batches call too."""
    session_header, comment_s = config.session_header, config.stream_comment_s
    inference = InferenceServicer(models, session_header)
    server.add(SERVICE_NAME, partial(add_InferenceServiceServicer_to_server, inference))
    openai = OpenAiServicer(models, bodies, session_header, comment_s=comment_s)
    server.add(OPENAI_SERVICE_NAME, partial(add_OpenAiServiceServicer_to_server, openai))
    anthropic = AnthropicServicer(models, bodies, session_header, comment_s=comment_s)
    server.add(ANTHROPIC_SERVICE_NAME, partial(add_AnthropicServiceServicer_to_server, anthropic))
    return openai


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


async def _open_console(config: FrontendConfig, fleet: Fleet, names: _Names, stack: AsyncExitStack) -> int:
    """The console's port; 0: there is none."""
    if config.console_port is None:
        return 0
    # Imported only where it is on: its HTTP server takes 0.1 s to import.
    from tandem_frontend.console.opening import open_console

    return await stack.enter_async_context(open_console(config, fleet, names.frontend_id, names.address))


async def _register(config: FrontendConfig, names: _Names, stack: AsyncExitStack) -> Registration:
    """Register, so that edges and tools can discover this frontend. Clients that know its address need no entry."""
    frontend = Frontend(
        frontend_id=names.frontend_id,
        epoch=epoch_now(),
        address=names.address,
        model=config.registered_name,
        release=tandem.__version__,
    )
    registration = Registration(config.registry, frontend, tls=config.tls, may_be_fenced=False)
    stack.push_async_callback(registration.close)
    await log_doubts(frontend.address, config.registry)
    await registration.start()
    return registration
