"""What the controller knows of a fleet at one moment, and the counts that it makes of load reports.

Pure. Owns the sampling: a report says what is open in an engine at one moment, the sums over time are made here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from tandem.domain.worker import EngineLoad, Start, Worker, WorkerRole

SAMPLE_S_MAX = 5.0
"""A report stands for no longer than this: a worker that did not report was not known to be busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What all frontends together report."""

    open_requests: int
    """In progress, those in the queue included."""
    waiting_requests: int
    """In the frontends' queues."""
    ended_requests: int
    """Since the start of the frontends: finished, failed and cancelled. Refused ones had no use of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums of one start of a worker, since it was seen first."""

    sampled_s: float = 0.0
    """Time for which reports stand."""
    busy_s: float = 0.0
    """The part of it in which the engine had a request."""
    stream_s: float = 0.0
    """Sum over time of the requests that generated."""
    computed_tokens: int = 0
    """Prompt tokens that were computed."""
    emitted_tokens: int = 0
    """Tokens that were generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenWorker:
    """One worker, its last load report, and what it has done."""

    worker: Worker
    load: EngineLoad | None
    """None: there is no current report."""
    counts: Counts
    roles: Collection[WorkerRole]
    """Roles that it may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A fleet at one moment."""

    at_s: float
    """On a clock that never steps."""
    is_live: bool
    """Whether the registry's view is live."""
    workers: tuple[SeenWorker, ...]
    """All workers of the model."""
    traffic: Traffic | None
    """None: some frontend does not answer, or there is none."""


@dataclass(slots=True)
class _Sample:
    at_s: float
    load: EngineLoad
    first_computed: int
    first_emitted: int
    counts: Counts = field(default_factory=Counts)


class LoadSampler:
    """Sums over the load reports of all workers."""

    def __init__(self) -> None:
        self._samples: dict[Start, _Sample] = {}

    def note(self, start: Start, load: EngineLoad, emitted_tokens: int | None, at_s: float) -> None:
        """Add a report. `emitted_tokens`: since the start of the worker; None: not reported."""
        computed, emitted = load.computed_tokens or 0, emitted_tokens or 0
        last = self._samples.get(start)
        if last is None:
            self._samples[start] = _Sample(at_s, load, computed, emitted)
            return
        elapsed_s = min(SAMPLE_S_MAX, max(0.0, at_s - last.at_s))
        counts = last.counts
        last.counts = Counts(
            sampled_s=counts.sampled_s + elapsed_s,
            busy_s=counts.busy_s + (elapsed_s if _is_busy(last.load) else 0.0),
            stream_s=counts.stream_s + elapsed_s * (last.load.running_requests or 0),
            computed_tokens=max(counts.computed_tokens, computed - last.first_computed),
            emitted_tokens=max(counts.emitted_tokens, emitted - last.first_emitted),
        )
        last.at_s, last.load = at_s, load

    def of(self, start: Start) -> Counts:
        """The sums of one start of a worker."""
        sample = self._samples.get(start)
        return Counts() if sample is None else sample.counts

    def keep(self, starts: Collection[Start]) -> None:
        """Forget all other workers."""
        self._samples = {start: sample for start, sample in self._samples.items() if start in starts}


def _is_busy(load: EngineLoad) -> bool:
    return bool(load.running_requests or load.waiting_requests)
