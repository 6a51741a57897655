"""Readings of a worker's gauges: open legs, engine health, the engine's requests and its KV pages; dropped messages.

Read-only. A value that the engine does not report is omitted, never zero.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from tandem.domain.handover import DropReason
from tandem.domain.worker import EngineLoad
from tandem.engine.port import Engine
from tandem.errors import EngineFailed
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.metrics import Metrics, Reading
from tandem.observability.request_trace import FAILED, LegTrace
from tandem.observability.trace_store import TraceStore
from tandem.worker.engine_health import EngineHealth
from tandem.worker.legs import Legs

DROPPED_INTERVAL_S = 0.5


class LegStats:
    """Monotonic counters over all legs since start."""

    def __init__(self, traces: TraceStore[LegTrace]) -> None:
        """Subscribe to `traces`, which calls `close` when a leg ends."""
        self._traces = traces
        self._completion_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._kv_transfer_bytes = 0
        self._failed_legs = 0
        traces.sinks.append(self.close)

    def close(self, trace: LegTrace) -> None:
        """Add an ended leg to the counters."""
        self._completion_tokens += trace.token_count
        self._failed_legs += trace.outcome == FAILED
        finish = trace.engine_finish
        if finish is not None:
            self._prompt_tokens += trace.prompt_tokens
            self._cached_tokens += min(finish.cached_tokens or 0, trace.prompt_tokens)
            if finish.timings is not None:
                self._kv_transfer_bytes += finish.timings.kv_transfer_bytes or 0

    def counts(self) -> dict[str, int]:
        """The counters as keyword arguments of WatchLoadResponse, tokens of open legs included."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "completion_tokens": self._completion_tokens + sum(trace.token_count for trace in self._traces.open),
            "kv_transfer_bytes": self._kv_transfer_bytes,
            "failed_legs": self._failed_legs,
        }


class DroppedMessages:
    """Counts what the engine's hand-over ports drop. In a task of its own: a scrape reads counters before gauges."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._counted: dict[DropReason, int] = {}

    async def watch(self) -> None:
        """Add to the counter periodically until cancelled."""
        while True:
            await asyncio.sleep(DROPPED_INTERVAL_S)
            self.add()

    def add(self) -> None:
        """Add what was dropped since the last call."""
        for reason, count in self._engine.dropped_messages().items():
            if (new := count - self._counted.get(reason, 0)) > 0:
                self._metrics.count("tandem.engine.messages.dropped", new, {"tandem.reason": reason.value})
            self._counted[reason] = count


class WorkerStats:
    """Reads the gauges of one worker."""

    def __init__(self, engine: Engine, legs: Legs, health: EngineHealth, leg_metrics: LegMetrics) -> None:
        self._engine = engine
        self._legs = legs
        self._health = health
        self._leg_metrics = leg_metrics

    async def read(self) -> Iterable[Reading]:
        """The current value of each gauge."""
        readings = [
            Reading("tandem.legs.open", self._legs.open_count),
            Reading("tandem.adapters", self._legs.adapter_count),
            Reading("tandem.engine.healthy", float(self._health.trouble is None)),
        ]
        if (hit_ratio := self._leg_metrics.hit_ratio) is not None:
            readings.append(Reading("tandem.cache.hit_ratio", hit_ratio))
        try:
            load, page_tokens = await self._engine.load(), self._engine.capabilities().page_size_tokens
        except EngineFailed:
            # The engine has failed or is stopping: the gauges that do not need it are still reported.
            return readings
        return [*readings, *_requests(load), *_pages(load, page_tokens)]


def _requests(load: EngineLoad) -> Iterator[Reading]:
    counts = {
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "transferring": load.transferring_requests,
    }
    for state, count in counts.items():
        if count is not None:
            yield Reading("tandem.engine.requests", count, {"tandem.state": state})
    if load.waiting_tokens is not None:
        yield Reading("tandem.engine.waiting_tokens", load.waiting_tokens)


def _pages(load: EngineLoad, page_tokens: int) -> Iterator[Reading]:
    if load.kv_capacity_tokens is None or load.kv_used_tokens is None:
        return
    free_tokens = load.kv_free_tokens
    if free_tokens is None:
        # Some pools report neither free nor cached tokens: every page that no request uses then counts as free.
        free_tokens = load.kv_capacity_tokens - load.kv_used_tokens - (load.kv_cached_tokens or 0)
    tokens = {"used": load.kv_used_tokens, "cached": load.kv_cached_tokens, "free": free_tokens}
    yield Reading("tandem.kv.pages.capacity", load.kv_capacity_tokens // page_tokens)
    for state, count in tokens.items():
        if count is not None:
            yield Reading("tandem.kv.pages", count // page_tokens, {"tandem.state": state})
