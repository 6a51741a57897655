"""Metrics without a cluster: free when disabled, bounded when enabled, and no reader blocks a process."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as otlp_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as otlp_grpc

from tandem.config import ServiceConfig
from tandem.errors import StartError
from tandem.observability import otel_metrics
from tandem.observability.metric_attributes import OTHER, TENANTS_MAX, WORKERS_MAX
from tandem.observability.metric_catalog import BY_NAME, TABLE, Emitter, Kind, bounded, combinations
from tandem.observability.metric_types import Metric
from tandem.observability.metrics import Metrics, MorePages, Reading, open_metrics
from tandem.testing.eventually import assert_eventually
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls, client_tls

SERIES_MAX = 8_000
"""Of one process, whatever happens to it."""


@asynccontextmanager
async def serving(
    emitter: Emitter = Emitter.FRONTEND, tls: Tls | None = None, pages: MorePages | None = None, **settings: Any
) -> AsyncIterator[Metrics]:
    config = ServiceConfig(**{"metrics_port": 0, **settings})
    metrics = open_metrics(config, emitter, "tandem-test", tls, pages)
    await metrics.start("test-0")
    try:
        yield metrics
    finally:
        await metrics.stop()


async def scrape(metrics: Metrics, path: str = "/metrics", scheme: str = "http", **how: Any) -> str:
    def read() -> str:
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{metrics.port}{path}", timeout=5, **how) as response:
            return str(response.read().decode())

    return await asyncio.to_thread(read)


def test_off_it_does_nothing() -> None:
    metrics = open_metrics(ServiceConfig(), Emitter.FRONTEND, "tandem-test")
    assert type(metrics) is Metrics
    assert not metrics.is_on
    metrics.count("tandem.drains")
    metrics.record("tandem.queue.wait", 1.0)


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_row_is_whole(metric: Metric) -> None:
    assert metric.meaning.endswith(".")
    assert metric.emitters
    assert bool(metric.buckets) is (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    for attribute in metric.attributes:
        assert bool(attribute.values) is not bool(attribute.bound), "an attribute is bounded in one way"
    assert metric.name.startswith(("gen_ai.", "tandem."))


def test_a_value_that_is_not_in_the_table_makes_no_series() -> None:
    metric = BY_NAME["tandem.leg.failures"]
    given = {"tandem.leg": "decode", "tandem.phase": "dreaming", "tandem.reason": "free text of a caller"}
    assert bounded(metric, given) == {"tandem.leg": "decode", "tandem.phase": OTHER, "tandem.reason": OTHER}
    with pytest.raises(AssertionError, match="no attribute"):
        bounded(metric, {"request_id": "r-1"})


async def test_a_counter_shows_its_few_series_before_the_first_event() -> None:
    assert len(combinations(BY_NAME["tandem.requests.refused"])) > 10
    assert combinations(BY_NAME["tandem.leg.failures"]) == []
    async with serving() as metrics:
        text = await scrape(metrics)
    assert 'tandem_requests_refused_total{tandem_reason="OVERLOADED"} 0.0' in text
    assert "tandem_requests_admitted_total 0.0" in text


async def test_a_process_has_the_rows_of_its_kind_only() -> None:
    async with serving(Emitter.REGISTRY) as metrics:
        metrics.count("tandem.requests.admitted")
        metrics.count("tandem.drains")
        text = await scrape(metrics)
    assert "tandem_drains_total 1.0" in text
    assert "tandem_requests_admitted" not in text


async def test_a_gauge_is_read_on_the_loop_and_left_out_while_it_is_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(otel_metrics, "READ_TIMEOUT_S", 0.3)
    loops = set()

    async def read() -> Iterable[Reading]:
        loops.add(asyncio.get_running_loop())
        return [Reading("tandem.queue.depth", 7)]

    async with serving() as metrics:
        metrics.measure(read)
        assert "tandem_queue_depth 7.0" in await scrape(metrics)
        assert loops == {asyncio.get_running_loop()}
        await asyncio.sleep(otel_metrics.READ_EVERY_S)
        url = f"http://127.0.0.1:{metrics.port}/metrics"
        program = f"import urllib.request, time; t = time.time(); x = urllib.request.urlopen({url!r}).read()"
        child = subprocess.Popen(  # noqa: ASYNC220 -- to hold the loop up is the point
            [sys.executable, "-c", f"{program}; print(time.time() - t, b'queue_depth' in x, b'admitted' in x)"],
            stdout=subprocess.PIPE,
            text=True,
        )
        said, _ = child.communicate(timeout=30)  # the loop stands still here
        took_s, has_gauge, has_counter = said.split()
        assert (has_gauge, has_counter) == ("False", "True")
        assert float(took_s) < 5, "the scrape waited for the loop"


async def test_pages_besides_the_metrics_are_answered_by_path() -> None:
    def away() -> bytes:
        raise ConnectionRefusedError("no server is there")

    async with serving(pages={"/envoy": lambda: b"envoy_x 1\n", "/away": away}) as metrics:
        assert await scrape(metrics, "/envoy") == "envoy_x 1\n"
        for path, status in (("/", 404), ("/away", 503)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                await scrape(metrics, path)
            assert refused.value.code == status
            refused.value.close()


async def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"cannot listen for metrics on 127.0.0.1:{port}"):
            async with serving(metrics_port=port):
                pass


async def test_idle_connections_take_no_thread_for_ever() -> None:
    async with serving() as metrics:
        held = [socket.create_connection(("127.0.0.1", metrics.port)) for _ in range(30)]
        await asyncio.sleep(0.3)
        for connection in held:
            connection.close()

        async def answers() -> bool:
            try:
                return "tandem_drains_total" in await scrape(metrics)
            except OSError:
                return False

        await assert_eventually(answers, within_s=8, what="an answer once they have gone")


async def test_with_tls_a_scrape_requires_a_client_certificate(tmp_path: Path) -> None:
    issue_all(tmp_path)
    own = client_tls(tmp_path)
    assert own is not None
    async with serving(tls=Tls.in_directory(tmp_path, "frontend")) as metrics:
        context = ssl.create_default_context(cafile=str(own.ca))
        with pytest.raises(OSError):  # noqa: PT011 -- which one depends on who of both is faster
            await scrape(metrics, scheme="https", context=context)
        context.load_cert_chain(own.cert, own.key)
        assert "tandem_drains_total" in await scrape(metrics, scheme="https", context=context)
        with pytest.raises(OSError):  # noqa: PT011
            await scrape(metrics)


class Receiver(otlp_grpc.MetricsServiceServicer):
    """What a collector's OTLP receiver is, as far as a process can see."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.services: set[str] = set()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_metrics:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(f"{attributes['service.name']} {attributes['service.instance.id']}")
            self.names |= {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
        return otlp_pb.ExportMetricsServiceResponse()


async def test_metrics_are_pushed_to_a_receiver_and_the_last_ones_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel_metrics, "PUSH_INTERVAL_S", 0.2)
    receiver, server = Receiver(), grpc.server(futures.ThreadPoolExecutor(2))
    otlp_grpc.add_MetricsServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]  # generated
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        async with serving(metrics_port=None, otlp_endpoint=f"http://127.0.0.1:{port}") as metrics:
            assert metrics.port == 0
            await assert_eventually(lambda: receiver.names, lambda names: "tandem.drains" in names, what="a push")
            monkeypatch.setattr(otel_metrics, "PUSH_INTERVAL_S", 60)
            metrics.record("tandem.queue.wait", 0.1)
        assert "tandem.queue.wait" in receiver.names
        assert receiver.services == {"tandem-test test-0"}
    finally:
        await asyncio.to_thread(server.stop(None).wait)


async def test_a_dead_collector_delays_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otel_metrics, "PUSH_INTERVAL_S", 0.1)
    caplog.set_level(logging.CRITICAL)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # It takes connections and never answers.
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = ServiceConfig(metrics_port=0, otlp_endpoint=endpoint)
        metrics = open_metrics(config, Emitter.FRONTEND, "tandem-test")
        await metrics.start("test-0")
        await asyncio.sleep(0.5)
        began_s = time.monotonic()
        for _ in range(1_000):
            metrics.record("tandem.queue.wait", 0.1)
        assert time.monotonic() - began_s < 0.5
        assert "tandem_queue_wait_seconds_count 1000.0" in await scrape(metrics)
        began_s = time.monotonic()
        await metrics.stop()
        assert time.monotonic() - began_s < otel_metrics.STOP_TIMEOUT_S + 2


@pytest.mark.parametrize("emitter", Emitter)
def test_the_series_of_a_process_are_few_whatever_happens(emitter: Emitter) -> None:
    """All values of all attributes together, which no process could reach."""
    own = [metric for metric in TABLE if emitter in metric.emitters]
    assert sum(map(series_at_most, own)) < SERIES_MAX


def series_at_most(metric: Metric) -> int:
    bounds = {"tandem.worker.id": WORKERS_MAX + 1, "tandem.tenant": TENANTS_MAX + 1, "gen_ai.request.model": 1}
    values = [len(one.values) + 1 if one.values else bounds[one.name] for one in metric.attributes]
    return math.prod(values) * (len(metric.buckets) + 3 if metric.buckets else 1)
