"""The decode batch of one accounted engine: a token for each request in each step, and the memory that they need.

Steps between two changes of the batch are computed at once, because a decode step's time is linear in the tokens of its
context: exact, and a thousand times fewer events. Owns batch and memory; `engine` owns the time.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tandem.engine.simulated.options import Options
from tandem.engine.simulated.timing import decodes_s
from tandem_frontend.replay.job import Job


@dataclass(frozen=True, slots=True)
class Run:
    """Some decode steps of an unchanged batch."""

    requests: int
    context_tokens: int
    """In the first step."""
    steps: int
    scale: float
    """Factor on all its times: the jitter of this run."""

    def time_s(self, options: Options, steps: int) -> float:
        """Time of the first `steps` of its steps."""
        mean_context = self.context_tokens + self.requests * (steps - 1) / 2
        return self.scale * steps * decodes_s(options, self.requests, mean_context)

    def steps_begun(self, options: Options, elapsed_s: float) -> int:
        """How many of its steps have ended or are in progress after `elapsed_s`; at least 1."""
        ends = range(1, self.steps)
        return 1 + bisect_left(ends, elapsed_s, key=lambda steps: self.time_s(options, steps))


class DecodeBatch:
    """Requests that generate, and those that wait for a place among them."""

    def __init__(self, options: Options, running_requests_max: int) -> None:
        self._options = options
        self._running_requests_max = running_requests_max
        self.waiting: deque[Job] = deque()
        self._running: list[tuple[int, int, Job]] = []
        """Heap of (step after which it ends, order, request)."""
        self._order = itertools.count()
        self._step = 0
        self._context_tokens = 0
        self._entered_count = 0
        """Requests that have entered since the last step: their first token is not a step old."""
        self._last_s: float | None = None
        """End of the last step; None: there was none in this batch."""
        self.gaps: list[tuple[float, int]] = []
        """(seconds between two tokens of a request, how many times)."""
        self.begun_count = 0
        self.emitted_tokens = 0
        self.peak = 0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def has_place(self) -> bool:
        """Whether one more request can generate."""
        return len(self._running) < self._running_requests_max

    def enter(self, now_s: float) -> list[Job]:
        """Move requests that wait into the batch; each gets its first token. Returns those that end with it."""
        ended: list[Job] = []
        while self.waiting and self.has_place:
            job = self.waiting.popleft()
            job.first_token_s = now_s
            self.begun_count += 1
            self.emitted_tokens += 1
            if job.answer_tokens == 1:
                ended.append(job)
                continue
            heapq.heappush(self._running, (self._step + job.answer_tokens - 1, next(self._order), job))
            self._context_tokens += job.prompt_tokens
            self._entered_count += 1
        self.peak = max(self.peak, len(self._running))
        return ended

    def plan(self, scale: float) -> Run | None:
        """All steps until the next request ends; None: the batch is empty."""
        if not self._running:
            return None
        return Run(len(self._running), self._context_tokens, self._running[0][0] - self._step, scale)

    def commit(self, run: Run, steps: int, begin_s: float) -> list[Job]:
        """Apply the first `steps` steps of a run that began at `begin_s`. Returns the requests that end with them."""
        self._note_gaps(run, steps, begin_s)
        self._step += steps
        self._context_tokens += run.requests * steps
        self.emitted_tokens += run.requests * steps
        ended: list[Job] = []
        while self._running and self._running[0][0] <= self._step:
            job = heapq.heappop(self._running)[-1]
            self._context_tokens -= job.prompt_tokens + job.answer_tokens - 1
            ended.append(job)
        return ended

    def _note_gaps(self, run: Run, steps: int, begin_s: float) -> None:
        """Count the times between tokens; that of the first step has the prompts computed since the step before."""
        first_s, all_s = run.time_s(self._options, 1), run.time_s(self._options, steps)
        older = run.requests - self._entered_count
        if older and self._last_s is not None:
            self.gaps.append((begin_s + first_s - self._last_s, older))
        if self._entered_count:
            self.gaps.append((first_s, self._entered_count))
        if steps > 1:
            self.gaps.append(((all_s - first_s) / (steps - 1), run.requests * (steps - 1)))
        self._entered_count, self._last_s = 0, begin_s + all_s


class DecodeMemory:
    """KV memory for prompts and answers, granted in the order of asking. A request holds all that it may need."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0
        self.peak_tokens = 0
        self.asking: deque[tuple[Job, Callable[[], None]]] = deque()

    @property
    def asked_tokens(self) -> int:
        """Of the requests that wait for memory."""
        return sum(job.prompt_tokens + job.answer_tokens for job, _ in self.asking)

    def ask(self, job: Job, granted: Callable[[], None]) -> None:
        """Reserve memory for a request; `granted` is called at once or later."""
        self.asking.append((job, granted))
        self._grant()

    def release(self, job: Job) -> None:
        """Return a request's memory."""
        self.used_tokens -= job.prompt_tokens + job.answer_tokens
        self._grant()

    def _grant(self) -> None:
        while self.asking:
            job, granted = self.asking[0]
            used = self.used_tokens + job.prompt_tokens + job.answer_tokens
            if used > self.capacity_tokens:
                return
            self.asking.popleft()
            self.used_tokens = used
            self.peak_tokens = max(self.peak_tokens, used)
            granted()
