"""Exports the spans of traces to an OTLP collector over gRPC.

A request only appends its closed trace to a bounded queue; a thread builds the spans and sends them. If the collector
is slow or unreachable, traces are dropped and counted: requests never wait and memory is bounded. OpenTelemetry is
imported here, and only when an endpoint is set.
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
"""Maximum number of queued traces: a few seconds of a busy frontend, at some kilobytes each."""
BATCH_MAX = 128
"""Traces per export call."""
INTERVAL_S = 1.0
EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
"""Limit of the last export when a process exits."""


class SpanExport:
    """Queues closed traces and exports their spans."""

    def __init__(self, endpoint: str, resource: Mapping[str, str], *, queue_max: int = QUEUE_MAX) -> None:
        """`endpoint`: URL, or host:port for plaintext; `resource`: attributes that identify this process."""
        self.dropped_count = 0
        """Traces that were not exported: the queue was full, or the collector failed."""
        self.exported_count = 0
        """Traces whose spans were exported."""
        self._queue: deque[RequestTrace | LegTrace] = deque()
        self._queue_max = queue_max
        self._wake = threading.Event()
        self._is_closing = False
        self._is_failing = False
        self._is_full = False
        # Imported here, as the exporter is: both need OpenTelemetry's packages.
        from tandem.observability.otlp import Encoder

        self._encoder = Encoder(resource)
        self._exporter = _exporter(endpoint)
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self._thread.start()

    @property
    def queued_count(self) -> int:
        """Queued traces."""
        return len(self._queue)

    def take(self, trace: RequestTrace | LegTrace) -> None:
        """Queue a closed trace for export, or drop it if the queue is full; never waits."""
        if not is_sampled(trace):
            return
        if len(self._queue) >= self._queue_max:
            self.dropped_count += 1
            if not self._is_full:
                log.warning(
                    "span export queue is full (%d traces): the collector is too slow, dropping traces", self._queue_max
                )
            self._is_full = True
            return
        self._is_full = False
        self._queue.append(trace)
        if len(self._queue) == BATCH_MAX:
            self._wake.set()

    def close(self) -> None:
        """Export what is queued; blocks for at most CLOSE_TIMEOUT_S."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        # Aborts a hanging call and the wait before a retry.
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
            exported = self._exporter.export(self._encoder.request(batch)).name == "SUCCESS"
        except Exception as problem:
            # An exception must not end the thread: all later traces would be lost silently.
            log.debug("span export failed", exc_info=True)
            self._log_transition(exported=False, problem=type(problem).__name__)
            self.dropped_count += len(batch)
            return
        if exported:
            self.exported_count += len(batch)
        else:
            self.dropped_count += len(batch)
        self._log_transition(exported=exported, problem="the collector is unreachable or rejects them")

    def _log_transition(self, *, exported: bool, problem: str) -> None:
        """Log once when exports start to fail, and once when they work again."""
        if exported and self._is_failing:
            log.info("span export works again; %d traces were dropped so far", self.dropped_count)
        elif not exported and not self._is_failing:
            log.warning("span export failed: %s; traces are dropped, requests are not affected", problem)
        self._is_failing = not exported


def export_spans(
    traces: TraceStore[RequestTrace] | TraceStore[LegTrace],
    endpoint: str | None,
    ratio: float,
    resource: Mapping[str, str],
) -> SpanExport | None:
    """Export the spans of all traces of a store; without an endpoint returns None and imports nothing."""
    if endpoint is None:
        return None
    export = SpanExport(endpoint, resource)
    traces.ids = trace_ids(ratio)
    traces.sinks.append(export.take)
    log.info("exporting spans to %s (sample ratio %g)", endpoint, ratio)
    return export


def resource(role: str, instance: str) -> dict[str, str]:
    """Resource attributes of this process, by OpenTelemetry's conventions."""
    return {
        "service.namespace": "tandem",
        "service.name": f"tandem-{role}",
        "service.instance.id": instance,
        "service.version": tandem.__version__,
    }


def _exporter(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    class Exporter(OTLPSpanExporter):
        """The SDK's exporter, with its credentials, headers and retries, for messages that are encoded already."""

        def _translate_data(self, data: Any) -> Any:
            return data

        def _count_data(self, data: Any) -> int:
            return len(data.resource_spans[0].scope_spans[0].spans)

    # The SDK logs every failed export; the transitions logged above are enough.
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").setLevel(logging.CRITICAL)
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    return Exporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)
