"""What a collector that is gone, hangs or comes back does to requests: nothing, and what is lost is counted."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tandem.observability.request_trace import RequestTrace
from tandem.observability.span_export import BATCH_MAX, CLOSE_TIMEOUT_S, SpanExport, export_spans, resource
from tandem.observability.trace_store import TraceStore
from tandem.testing.eventually import assert_eventually
from tests.integration.support.otlp_receiver import receiver

pytestmark = [pytest.mark.timeout(60)]

TAKEN_S = 0.001
"""To hand a record over takes a microsecond; a collector's own times are a thousand times longer."""


@contextlib.contextmanager
def export(address: str, **options: int) -> Iterator[tuple[TraceStore[RequestTrace], SpanExport]]:
    traces: TraceStore[RequestTrace] = TraceStore()
    spans = export_spans(traces, address, 1.0, resource("frontend", "f"))
    assert spans is not None
    if "queue_max" in options:
        spans._queue_max = options["queue_max"]
    try:
        yield traces, spans
    finally:
        spans.close()


def one(traces: TraceStore[RequestTrace], number: int) -> float:
    """A request; how long its end took."""
    with traces.following(RequestTrace(request_id=f"r{number}")) as trace:
        trace.finish("stop", 1, 1, 0)
        begin_s = time.perf_counter()
    return time.perf_counter() - begin_s


def test_without_an_endpoint_nothing_is_made() -> None:
    traces: TraceStore[RequestTrace] = TraceStore()
    threads = threading.active_count()
    assert export_spans(traces, None, 1.0, {}) is None
    assert (traces.ids, traces.sinks, threading.active_count()) == (None, [], threads)


async def test_a_dead_collector_costs_requests_nothing() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with export(address, queue_max=200) as (traces, spans):
            times_s = sorted([one(traces, number) for number in range(1000)])
            assert times_s[500] < TAKEN_S
            assert spans.queued_count <= 200
            assert spans.dropped_count >= 1000 - 200 - BATCH_MAX
            begin_s = time.perf_counter()
        assert time.perf_counter() - begin_s < CLOSE_TIMEOUT_S + 1
        assert spans.dropped_count + spans.exported_count <= 1000
        assert spans.exported_count == 0


async def test_a_hanging_collector_costs_requests_nothing() -> None:
    async with receiver() as collector:
        collector.hangs = True
        with export(collector.address, queue_max=200) as (traces, spans):
            one(traces, -1)
            await assert_eventually(lambda: collector.call_count, within_s=10, what="a call that hangs")
            times_s = sorted([one(traces, number) for number in range(1000)])
            assert times_s[500] < TAKEN_S
            assert spans.queued_count <= 200
            assert spans.dropped_count >= 800
            begin_s = time.perf_counter()
            await asyncio.to_thread(spans.close)
            assert time.perf_counter() - begin_s < CLOSE_TIMEOUT_S + 1
        assert not collector.spans


async def test_a_collector_that_comes_later_gets_what_comes_then() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with export(f"127.0.0.1:{port}") as (traces, spans):
        one(traces, 0)
        await asyncio.sleep(0.2)
        async with receiver(port) as collector:

            def exported() -> bool:
                one(traces, 1)
                return any(span.attributes["tandem.request_id"] == "r1" for span in collector.spans)

            await assert_eventually(exported, within_s=20, every_s=0.2, what="a span of the time after")
        await asyncio.to_thread(spans.close)


async def test_the_end_of_a_process_sends_what_is_left() -> None:
    async with receiver() as collector:
        with export(collector.address) as (traces, spans):
            for number in range(BATCH_MAX + 7):
                one(traces, number)
            await asyncio.to_thread(spans.close)
        assert len({span.attributes["tandem.request_id"] for span in collector.spans}) == BATCH_MAX + 7
        assert (spans.exported_count, spans.dropped_count) == (BATCH_MAX + 7, 0)


async def test_a_ratio_of_none_exports_nothing() -> None:
    async with receiver() as collector:
        traces: TraceStore[RequestTrace] = TraceStore()
        spans = export_spans(traces, collector.address, 0.0, resource("frontend", "f"))
        assert spans is not None
        one(traces, 1)
        await asyncio.to_thread(spans.close)
        assert not collector.spans
        assert spans.exported_count == 0
