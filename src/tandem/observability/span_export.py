"""Spans of courses to an OTLP collector, over gRPC.

A request pays for putting its closed record into a bounded queue; a thread makes the spans and sends them. When the
collector is slow or gone, the queue fills and records are dropped and counted: requests never wait and memory does not
grow. OpenTelemetry's packages are imported here, and only when an endpoint is set.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import tandem
from tandem.observability.request_trace import LegTrace, RequestTrace
from tandem.observability.spans import is_sampled
from tandem.observability.trace_store import TraceStore, trace_ids

log = logging.getLogger(__name__)

QUEUE_MAX = 1024
"""Closed courses that wait: a few seconds of a busy frontend, at some kilobytes each."""
BATCH_MAX = 128
"""TraceStore of one call of the collector."""
INTERVAL_S = 1.0
EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
"""Most time that the end of a process waits for a collector."""


class SpanExport:
    """Takes closed courses, and sends their spans."""

    def __init__(self, endpoint: str, resource: Mapping[str, str], *, queue_max: int = QUEUE_MAX) -> None:
        """`endpoint` is a URL, or host:port for plaintext; `resource` says which process this is."""
        self.dropped_count = 0
        """TraceStore whose spans nobody has got: the queue was full, or the collector did not take them."""
        self.exported_count = 0
        """TraceStore whose spans the collector has taken."""
        self._queue: deque[RequestTrace | LegTrace] = deque()
        self._queue_max = queue_max
        self._wake = threading.Event()
        self._is_closing = False
        self._is_failing = False
        self._is_full = False
        # Imported with the exporter: both need OpenTelemetry's packages.
        from tandem.observability.otlp import Encoder

        self._encoder = Encoder(resource)
        self._exporter = _exporter(endpoint)
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self._thread.start()

    @property
    def queued_count(self) -> int:
        """TraceStore that wait."""
        return len(self._queue)

    def take(self, trace: RequestTrace | LegTrace) -> None:
        """Have a closed course's spans sent; never waits."""
        if not is_sampled(trace):
            return
        if len(self._queue) >= self._queue_max:
            self.dropped_count += 1
            if not self._is_full:
                log.warning("spans are made faster than the collector takes them; some requests go without")
            self._is_full = True
            return
        self._is_full = False
        self._queue.append(trace)
        if len(self._queue) == BATCH_MAX:
            self._wake.set()

    def close(self) -> None:
        """Send what is queued, within CLOSE_TIMEOUT_S; blocks so long at most."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        # Ends a call that hangs and a wait before another try.
        self._exporter.shutdown()
        self.dropped_count += len(self._queue)
        self._queue.clear()

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.wait(INTERVAL_S)
            self._wake.clear()
            while self._queue:
                self._send()

    def _send(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
        try:
            taken = self._exporter.export(self._encoder.request(batch)).name == "SUCCESS"
        except Exception as problem:
            # The end of this thread would be the end of all traces, and nobody would notice.
            log.debug("spans could not be sent", exc_info=True)
            self._tell(taken=False, problem=type(problem).__name__)
            self.dropped_count += len(batch)
            return
        if taken:
            self.exported_count += len(batch)
        else:
            self.dropped_count += len(batch)
        self._tell(taken=taken, problem="the collector does not take them")

    def _tell(self, *, taken: bool, problem: str) -> None:
        """Once when it begins to fail, and once when it works again."""
        if taken and self._is_failing:
            log.info("spans are sent again; those of %d requests were dropped", self.dropped_count)
        elif not taken and not self._is_failing:
            log.warning("spans are not sent: %s; requests go on without", problem)
        self._is_failing = not taken


def export_spans(
    traces: TraceStore[RequestTrace] | TraceStore[LegTrace],
    endpoint: str | None,
    ratio: float,
    resource: Mapping[str, str],
) -> SpanExport | None:
    """Have the spans of all these courses exported; None, and nothing imported, where there is no endpoint."""
    if endpoint is None:
        return None
    export = SpanExport(endpoint, resource)
    traces.ids = trace_ids(ratio)
    traces.sinks.append(export.take)
    log.info("spans of %g of all requests go to %s", ratio, endpoint)
    return export


def resource(role: str, instance: str) -> dict[str, str]:
    """Which process tells, by OpenTelemetry's conventions."""
    return {
        "service.namespace": "tandem",
        "service.name": f"tandem-{role}",
        "service.instance.id": instance,
        "service.version": tandem.__version__,
    }


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    class Exporter(OTLPSpanExporter):
        """The SDK's, with its credentials, headers and retries, for messages that are encoded already."""

        def _translate_data(self, data: Any) -> Any:
            return data

        def _count_data(self, data: Any) -> int:
            return len(data.resource_spans[0].scope_spans[0].spans)

    # It would log each of its tries; `_tell` says what an operator needs.
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").setLevel(logging.CRITICAL)
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    return Exporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)
