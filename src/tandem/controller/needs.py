"""How many workers of each role a load needs: its arrivals and its queues, in the workers' own speeds.

Pure arithmetic over the observations of a window. Owns what is measured and how; `rule` decides what follows.

Prefill: the rate at which prompts arrive, waiting ones included, over the rate at which a busy worker computes them.
Decode: the requests that generate or are about to, over those that one worker can have within the goal for the ITL.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from tandem.controller.figures import Counts, Observation, SeenWorker
from tandem.domain.worker import WorkerRole, WorkerState

FULL = 0.9
"""From this share of its memory or places on, decode makes the frontends' queues wait."""
SPREAD_MIN = 0.02
"""Of the squared mean: with less variance among batch sizes no line can be fitted."""
MEASURED_MIN = 100.0
"""Requests times seconds of generation, summed over windows, from which on the time of a step is known."""
KEEP = 0.995
"""Weight of the former measurements of a decode step at each new one."""
PROMPTS_KEEP = 0.7
"""Weight of the former length of a waiting prompt at each new one."""
BUSY_S_MIN = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Workers that a load needs; fractions of one included."""

    prefill: float
    decode: float
    words: str
    """How they come about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedSettings:
    """What a need is counted for."""

    ttft_s: float
    itl_s: float
    window_s: float
    """Over which rates are taken."""
    prefill_share: float
    """Of its time that a prefill worker may compute: beyond it, prompts wait too long."""
    decode_share: float
    """Of its places, its memory, or the streams of the goal that a decode worker may use."""


class _StepLine:
    """The time of a decode step as a line over its requests, fitted with forgetting."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, streams: float, step_s: float, weight: float) -> None:
        """A measurement; its weight is that of the requests in it, whose few tokens say little of a step."""
        for name, value in (
            *(("_n", 1.0), ("_x", streams), ("_y", step_s)),
            *(("_xx", streams * streams), ("_xy", streams * step_s)),
        ):
            setattr(self, name, getattr(self, name) * KEEP + weight * value)

    def streams_at(self, step_s: float) -> float:
        """Requests with which a step takes that long; `inf`: not known, or any number."""
        if self._n < MEASURED_MIN:
            return math.inf
        mean, mean_s, slope = self._line()
        if slope > 0:
            return max(1.0, mean + (step_s - mean_s) / slope)
        # Of one size only, or no line: steps too long are taken as proportional to it, which errs to the safe side.
        return mean * step_s / mean_s if mean_s > step_s else math.inf

    def step_at(self, streams: float) -> float:
        """Time of a step with so many requests; 0: not known."""
        if self._n < MEASURED_MIN:
            return 0.0
        mean, mean_s, slope = self._line()
        return max(0.0, mean_s + slope * (streams - mean)) if slope > 0 else mean_s

    def _line(self) -> tuple[float, float, float]:
        """Means of requests and of step times, and the slope; 0: too little variance."""
        mean, mean_s = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean * mean
        slope = (self._xy / self._n - mean * mean_s) / variance if variance >= SPREAD_MIN * mean * mean else 0.0
        return mean, mean_s, slope


class NeedMeter:
    """Measures the needs of a load, observation by observation."""

    def __init__(self, settings: NeedSettings) -> None:
        self._settings = settings
        self._window: deque[Observation] = deque()
        self._line = _StepLine()
        self._speed = 0.0
        """Prompt tokens a second of a busy prefill worker; 0: not known yet."""
        self._prompt_tokens = 0.0
        """Of a prompt that waits."""

    def add(self, now: Observation) -> Needs | None:
        """Add an observation; None: there is too little to know the needs yet."""
        self._window.append(now)
        while self._window[0].at_s < now.at_s - self._settings.window_s:
            self._window.popleft()
        then = self._window[0]
        if now.at_s - then.at_s < self._settings.window_s / 3 or now.traffic is None or then.traffic is None:
            return None
        # Over the whole window: within a second few tokens are generated, and some are reported a moment later.
        self._measure_steps(then, now)
        self._measure_prompts(then, now)
        return self._needs(then, now)

    def restart(self) -> None:
        """Begin a new window, after the fleet has changed; what was learnt of the engines stays."""
        self._window.clear()

    def _needs(self, then: Observation, now: Observation) -> Needs:
        assert now.traffic is not None, "checked before"
        assert then.traffic is not None, "checked before"
        is_full = self._is_decode_full(now)
        prefill, prompts = self._prefill(then, now, is_full=is_full)
        streams, streams_max, memory = self._decode(now, is_full=is_full)
        # Fewer workers have larger batches and slower steps, so those open now are too few for them: the tokens
        # that are generated count too, of which a worker with all the requests that it may have gives so many.
        emitted = sum(one.emitted_tokens for one in _since(then, now, WorkerRole.DECODE)) / (now.at_s - then.at_s)
        generating = emitted * self._line.step_at(streams_max)
        decode = max(max(streams, generating) / streams_max, memory) / self._settings.decode_share
        words = (
            f"{prompts}; {streams:,.0f} requests generate or are about to, a decode worker has room for "
            f"{streams_max:,.0f} within the ITL"
        )
        return Needs(prefill=prefill, decode=decode, words=words)

    # --- Prefill

    def _prefill(self, then: Observation, now: Observation, *, is_full: bool) -> tuple[float, str]:
        """The need for prefill workers, in words too."""
        elapsed_s, done = now.at_s - then.at_s, _since(then, now, WorkerRole.PREFILL)
        if not self._speed:
            busy = sum(one.busy_s for one in done) / elapsed_s
            return busy / self._settings.prefill_share, f"{busy:.1f} prefill workers are busy"
        backlog, backlog_then = (self._backlog(one, is_full=is_full) for one in (now, then))
        computed = sum(one.computed_tokens for one in done)
        arriving = max(0.0, computed + backlog - backlog_then) / elapsed_s
        steady = arriving / self._speed / self._settings.prefill_share
        # What waits is to be computed within the goal, beside what arrives.
        catching_up = backlog / self._speed / max(self._settings.window_s, self._settings.ttft_s)
        words = (
            f"prompts arrive at {arriving:,.0f} tokens/s, {backlog:,.0f} tokens wait, a busy prefill worker computes "
        )
        return steady + catching_up, f"{words}{self._speed:,.0f}/s"

    def _measure_prompts(self, then: Observation, now: Observation) -> None:
        done = _since(then, now, WorkerRole.PREFILL)
        busy_s = sum(one.busy_s for one in done)
        computed = sum(one.computed_tokens for one in done)
        if busy_s >= BUSY_S_MIN and computed:
            self._speed = computed / busy_s
        waiting = [one.load for one in now.workers if one.worker.role is WorkerRole.PREFILL and one.load is not None]
        count = sum(load.waiting_requests or 0 for load in waiting)
        tokens = sum(load.waiting_tokens or 0 for load in waiting)
        assert now.traffic is not None, "checked before"
        assert then.traffic is not None, "checked before"
        ended = now.traffic.ended_requests - then.traffic.ended_requests
        size = tokens / count if count else computed / ended if ended > 0 else 0.0
        if size:
            self._prompt_tokens += (1 - PROMPTS_KEEP) * (size - self._prompt_tokens) if self._prompt_tokens else size

    def _backlog(self, one: Observation, *, is_full: bool) -> float:
        """Prompt tokens that wait, in engines and in the queues; not those that wait for decode."""
        assert one.traffic is not None, "checked before"
        engines = sum(
            seen.load.waiting_tokens or 0
            for seen in one.workers
            if seen.worker.role is WorkerRole.PREFILL and seen.load is not None
        )
        return engines + (0.0 if is_full else one.traffic.waiting_requests * self._prompt_tokens)

    # --- Decode

    def _decode(self, now: Observation, *, is_full: bool) -> tuple[float, float, float]:
        """Requests that generate or are about to, those that one worker may have, and its share of memory in use."""
        streaming = [one for one in now.workers if one.worker.role is WorkerRole.DECODE and one.load is not None]
        queued = now.traffic.waiting_requests if is_full and now.traffic is not None else 0
        streams = float(queued)
        used = capacity = 0
        places = math.inf
        for one in streaming:
            assert one.load is not None, "only those"
            streams += _open(one)
            capabilities = one.worker.capabilities
            places = min(places, capabilities.running_requests_max)
            used += one.load.kv_used_tokens or 0
            capacity = max(capacity, one.load.kv_capacity_tokens or capabilities.kv_capacity_tokens)
        streams_max = max(1.0, min(places, self._line.streams_at(self._settings.itl_s)))
        # A queue in front of full decode workers needs memory in the proportion of those that have it.
        holding = streams - queued
        memory = used / capacity * (streams / holding if holding else 1.0) if capacity else 0.0
        return streams, streams_max, memory

    def _is_decode_full(self, now: Observation) -> bool:
        """Whether the frontends' queues wait for decode."""
        streaming = [one for one in now.workers if one.worker.role is WorkerRole.DECODE and _is_serving(one)]
        loads = [one.load for one in streaming if one.load is not None]
        places = sum(one.worker.capabilities.running_requests_max for one in streaming)
        capacity = sum(load.kv_capacity_tokens or 0 for load in loads)
        used = sum(load.kv_used_tokens or 0 for load in loads)
        return bool((places and sum(map(_open, streaming)) >= FULL * places) or (capacity and used >= FULL * capacity))

    def _measure_steps(self, before: Observation, now: Observation) -> None:
        for one in _since(before, now, WorkerRole.DECODE):
            if one.sampled_s > 0 and one.emitted_tokens > 0 and one.stream_s > 0:
                self._line.add(one.stream_s / one.sampled_s, one.stream_s / one.emitted_tokens, one.stream_s)


def _open(one: SeenWorker) -> int:
    load = one.load
    if load is None:
        return 0
    return (load.running_requests or 0) + (load.waiting_requests or 0) + (load.transferring_requests or 0)


def _is_serving(one: SeenWorker) -> bool:
    return one.worker.state is WorkerState.SERVING


def _since(then: Observation, now: Observation, role: WorkerRole) -> list[Counts]:
    """What each start of a worker in a role has done between two observations."""
    former = {one.worker.start: one.counts for one in then.workers}
    done = []
    for one in now.workers:
        if one.worker.role is role:
            before, after = former.get(one.worker.start, Counts()), one.counts
            done.append(
                Counts(
                    sampled_s=after.sampled_s - before.sampled_s,
                    busy_s=after.busy_s - before.busy_s,
                    stream_s=after.stream_s - before.stream_s,
                    computed_tokens=after.computed_tokens - before.computed_tokens,
                    emitted_tokens=after.emitted_tokens - before.emitted_tokens,
                )
            )
    return done
