"""Metrics through OpenTelemetry's SDK: instruments built from the catalog, scraped by Prometheus or pushed over OTLP.

The only metrics module that imports OpenTelemetry; imported only when metrics are enabled. Gauges are read on the
service's event loop, which owns the state they read. If the loop is blocked, a scrape waits for at most
`READ_TIMEOUT_S` and leaves the gauges out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, ProcessCollector

import tandem
from tandem.config import ServiceConfig
from tandem.domain.network_address import join_address
from tandem.errors import TandemError
from tandem.observability.merged_scrape import LocalScrapes
from tandem.observability.metric_catalog import BY_NAME, TABLE, Emitter, Kind, bounded, combinations
from tandem.observability.metric_types import Metric
from tandem.observability.metrics import NONE, Attributes, Measure, Metrics, MorePages, Reading, Together
from tandem.observability.scrape_endpoint import Others, ScrapeServer
from tandem.tls.paths import Tls

PERIOD_S = 0.25


async def watch_lag(report: Callable[[float], None]) -> None:
    """Report the delay of a timer in seconds, every `PERIOD_S`, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        report(max(0.0, loop.time() - due_s))


log = logging.getLogger(__name__)

READ_TIMEOUT_S = 1.0
"""Limit of a scrape's wait for the event loop."""
READ_EVERY_S = 0.2
"""Age up to which readings are reused, so that all gauges of one scrape are read once and together."""
PUSH_INTERVAL_S = 15.0
PUSH_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 1.0
"""An unresponsive collector must not delay the exit of a process."""


class OtelMetrics(Metrics):
    """See the module."""

    is_on = True

    def __init__(
        self,
        config: ServiceConfig,
        emitter: Emitter,
        service: str,
        tls: Tls | None,
        pages: MorePages,
        together: Together,
    ) -> None:
        """See `tandem.observability.metrics.open_metrics`. Opens nothing yet."""
        self._config = config
        self._metrics = {metric.name: metric for metric in TABLE if emitter in metric.emitters}
        self._service = service
        self._tls = tls
        self._pages = pages
        self._together = together
        self._instruments: dict[str, Any] = {}
        self._measures: list[Measure] = []
        self._provider: MeterProvider | None = None
        self._server: ScrapeServer | None = None
        self._lag: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._readings: dict[str, list[Observation]] = {}
        self._read_s = float("-inf")

    def count(self, name: str, amount: float = 1, attributes: Attributes = NONE) -> None:
        """See `Metrics`."""
        instrument = self._instruments.get(name)
        if instrument is not None:
            instrument.add(amount, bounded(BY_NAME[name], attributes))

    def record(self, name: str, value: float, attributes: Attributes = NONE) -> None:
        """See `Metrics`."""
        instrument = self._instruments.get(name)
        if instrument is not None:
            instrument.record(value, bounded(BY_NAME[name], attributes))

    def measure(self, read: Measure) -> None:
        """See `Metrics`."""
        self._measures.append(read)

    async def start(self, instance: str) -> None:
        """See `Metrics`."""
        registry = CollectorRegistry()
        if self._config.metrics_port is not None:
            # Bind first: if it fails, no thread has been started that would have to be stopped.
            server = self._server = ScrapeServer(registry, self._pages, self._tls, self._others())
            if self._together.path is not None:
                server.bind_local(self._together.path)
            else:
                server.bind(self._config.host, self._config.metrics_port)
            self.port = server.port
        self._provider = MeterProvider(
            metric_readers=self._readers(registry), resource=self._resource(instance), shutdown_on_exit=False
        )
        self._make_instruments(self._provider, asyncio.get_running_loop())
        self._lag = asyncio.create_task(watch_lag(partial(self.record, "tandem.event_loop.lag")), name="loop-lag")
        if self._server is not None:
            self._server.serve()
        if self.port:
            where = join_address(self._config.host, self.port)
            log.info("metrics at http%s://%s/metrics", "" if self._tls is None else "s", where)

    async def stop(self) -> None:
        """See `Metrics`."""
        if self._lag is not None:
            self._lag.cancel()
            await asyncio.wait({self._lag})
            self._lag = None
        provider, self._provider = self._provider, None
        if provider is not None:
            # In a thread: the last push reads gauges on this loop.
            await asyncio.to_thread(provider.shutdown, STOP_TIMEOUT_S * 1_000)
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.close)

    def _others(self) -> Others | None:
        together = self._together
        return Others(LocalScrapes(together.others), together.own_label) if together.others else None

    def _readers(self, registry: CollectorRegistry) -> list[MetricReader]:
        readers: list[MetricReader] = []
        if self._config.metrics_port is not None:
            readers.append(PrometheusMetricReader(scope_info_enabled=False, registry=registry))
            ProcessCollector(registry=registry)
        if self._config.otlp_endpoint is not None:
            readers.append(_push_reader(self._config.otlp_endpoint))
        return readers

    def _resource(self, instance: str) -> Resource:
        return Resource.create(
            {"service.name": self._service, "service.instance.id": instance, "service.version": tandem.__version__}
        )

    def _make_instruments(self, provider: MeterProvider, loop: asyncio.AbstractEventLoop) -> None:
        meter = provider.get_meter("tandem", tandem.__version__)
        for metric in self._metrics.values():
            about = {"unit": metric.unit, "description": metric.meaning}
            if metric.kind is Kind.COUNTER:
                self._instruments[metric.name] = counter = meter.create_counter(metric.name, **about)
                for attributes in combinations(metric):
                    # A rate over a counter that appears with its first event would miss that one.
                    counter.add(0, attributes)
            elif metric.kind is Kind.HISTOGRAM:
                self._instruments[metric.name] = meter.create_histogram(
                    metric.name, **about, explicit_bucket_boundaries_advisory=metric.buckets
                )
            else:
                meter.create_observable_gauge(metric.name, [self._callback(metric, loop)], **about)

    def _callback(
        self, metric: Metric, loop: asyncio.AbstractEventLoop
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda options: self._read(loop).get(metric.name, ())

    def _read(self, loop: asyncio.AbstractEventLoop) -> dict[str, list[Observation]]:
        """All gauges, read on the event loop in one go. Called in reader threads, once per gauge."""
        with self._lock:
            if time.monotonic() - self._read_s >= READ_EVERY_S:
                # Set before reading: after a timeout the other gauges of the scrape must not wait and log again.
                self._read_s, self._readings = time.monotonic(), {}
                self._readings = self._ask_loop(loop)
            return self._readings

    def _ask_loop(self, loop: asyncio.AbstractEventLoop) -> dict[str, list[Observation]]:
        if loop.is_closed():
            return {}
        future = asyncio.run_coroutine_threadsafe(self._measure_all(), loop)
        try:
            return future.result(READ_TIMEOUT_S)
        except TimeoutError:
            future.cancel()
            log.warning(
                "gauges are left out of this scrape: the event loop did not respond within %g s", READ_TIMEOUT_S
            )
            return {}

    async def _measure_all(self) -> dict[str, list[Observation]]:
        found: dict[str, list[Observation]] = defaultdict(list)
        for measure in self._measures:
            try:
                readings = await measure()
            except TandemError as problem:
                log.warning("some gauges are left out of this scrape, the other metrics are complete: %s", problem)
                continue
            for reading in readings:
                found[reading.name].append(_observation(reading))
        return found


def _observation(reading: Reading) -> Observation:
    return Observation(reading.value, bounded(BY_NAME[reading.name], reading.attributes))


def _push_reader(endpoint: str) -> MetricReader:
    """Pushes in its own thread; what cannot be delivered is dropped, and nothing waits for it."""
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    class Exporter(OTLPMetricExporter):
        """The SDK's exporter; logs once when the collector fails, and once when it has recovered."""

        is_failing = False

        def export(self, *arguments: Any, **options: Any) -> MetricExportResult:
            result = super().export(*arguments, **options)
            is_failing = result is not MetricExportResult.SUCCESS
            if is_failing is not self.is_failing:
                if is_failing:
                    log.warning(
                        "metrics push to %s failed; requests are not affected; retrying every %g s",
                        endpoint,
                        PUSH_INTERVAL_S,
                    )
                else:
                    log.info("metrics push to %s works again", endpoint)
            self.is_failing = is_failing
            return result

    # The SDK logs every failed push; the transitions logged above are enough.
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").setLevel(logging.CRITICAL)
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    return PeriodicExportingMetricReader(
        Exporter(endpoint=url, timeout=PUSH_TIMEOUT_S),
        export_interval_millis=PUSH_INTERVAL_S * 1_000,
        export_timeout_millis=PUSH_TIMEOUT_S * 1_000,
    )
