"""What a worker's gauges show: its legs, its engine's requests and KV memory, and whether the engine proves itself.

Reads only. A figure that the engine does not tell is left out, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tandem.domain.worker import EngineLoad
from tandem.engine.port import Engine
from tandem.errors import EngineFailed
from tandem.observability.leg_metrics import LegMetrics
from tandem.observability.metrics import Reading
from tandem.observability.request_trace import FAILED, LegTrace
from tandem.observability.trace_store import TraceStore
from tandem.worker.engine_health import EngineHealth
from tandem.worker.legs import Legs


class LegStats:
    """Counts that only grow."""

    def __init__(self, traces: TraceStore[LegTrace]) -> None:
        """Is told of every leg from here on."""
        self._traces = traces
        self._completion_tokens = 0
        self._prompt_tokens = 0
        self._kv_transfer_bytes = 0
        self._failed_legs = 0
        traces.sinks.append(self.close)

    def close(self, trace: LegTrace) -> None:
        """A leg has ended."""
        self._completion_tokens += trace.token_count
        self._failed_legs += trace.outcome == FAILED
        finish = trace.engine_finish
        if finish is not None:
            self._prompt_tokens += trace.prompt_tokens
            if finish.timings is not None:
                self._kv_transfer_bytes += finish.timings.kv_transfer_bytes or 0

    def counts(self) -> dict[str, int]:
        """As keyword arguments of WatchLoadResponse; tokens of open legs are among them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens + sum(trace.token_count for trace in self._traces.open),
            "kv_transfer_bytes": self._kv_transfer_bytes,
            "failed_legs": self._failed_legs,
        }


class WorkerStats:
    """Readings of one worker."""

    def __init__(self, engine: Engine, legs: Legs, health: EngineHealth, leg_metrics: LegMetrics) -> None:
        self._engine = engine
        self._legs = legs
        self._health = health
        self._leg_metrics = leg_metrics

    async def read(self) -> Iterable[Reading]:
        """All of this moment."""
        readings = [
            Reading("tandem.legs.open", self._legs.open_count),
            Reading("tandem.engine.healthy", float(self._health.trouble is None)),
        ]
        if (hit_ratio := self._leg_metrics.hit_ratio) is not None:
            readings.append(Reading("tandem.cache.hit_ratio", hit_ratio))
        try:
            load, page_tokens = await self._engine.load(), self._engine.capabilities().page_size_tokens
        except EngineFailed:
            # It is gone, or on its way: what the worker knows by itself is told all the same.
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


def _pages(load: EngineLoad, page_tokens: int) -> Iterator[Reading]:
    if load.kv_capacity_tokens is None or load.kv_used_tokens is None:
        return
    free_tokens = load.kv_free_tokens
    if free_tokens is None:
        # What no request holds can be had at once, cached or not.
        free_tokens = load.kv_capacity_tokens - load.kv_used_tokens - (load.kv_cached_tokens or 0)
    tokens = {"used": load.kv_used_tokens, "cached": load.kv_cached_tokens, "free": free_tokens}
    yield Reading("tandem.kv.pages.capacity", load.kv_capacity_tokens // page_tokens)
    for state, count in tokens.items():
        if count is not None:
            yield Reading("tandem.kv.pages", count // page_tokens, {"tandem.state": state})
