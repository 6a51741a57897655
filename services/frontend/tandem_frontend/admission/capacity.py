"""Free capacity of the workers: their capacity (requests, KV tokens) minus their current load.

Pure but for its clock. Counts only the workers that stream tokens (decode and aggregated), because a request stays
there longest and its whole KV is held there. A reported load is up to a second old, but this frontend's own share of it
is known exactly. So the share of the other frontends is estimated each time a reported load changes, and the own share
is added to it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import LEG_CONTRACT, EngineLoad, Start, Worker, WorkerRole, WorkerState

QUEUED_FRACTION = 0.25
"""Requests in an engine's own queue per running request: with an empty queue an engine idles between two requests."""
QUEUED_MIN = 2
ANSWER_TOKENS_MAX = 4096
"""Completion tokens that count at most: SGLang's own limit (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION). Longer completions
are rare, and engines handle them by retraction."""
FAIR_FRACTION = 0.05
"""A frontend with less load on the workers than all others together may exceed the capacity by this fraction (at least
one request): every frontend refills its own slots as they become free, so a late starter would never get its share."""


@dataclass(frozen=True, slots=True)
class _Headroom:
    """Capacity of one worker."""

    requests: int
    tokens: int
    """KV tokens."""
    request_tokens: int
    """KV tokens of the largest single request."""

    def used(self, load: EngineLoad | None) -> tuple[int, int]:
        """Requests and KV tokens in use, (0, 0) without a load.

        Clamped to this worker's capacity: one worker that reports nonsense must not use up the capacity of the others.
        """
        if load is None:
            return 0, 0
        requests = (load.running_requests or 0) + (load.waiting_requests or 0)
        return min(max(0, requests), self.requests), min(max(0, load.kv_used_tokens or 0), self.tokens)


class Capacity:
    """Capacity and load of all workers of one model, kept as sums that each change updates, so that a request only
    reads them.
    """

    def __init__(self, model: str, clock: Clock = monotonic, no_worker_wait_s: float = 0.0) -> None:
        """`no_worker_wait_s`: how long requests wait for successors after the last worker has left."""
        self._model = model
        self._clock = clock
        self._no_worker_wait_s = no_worker_wait_s
        self._view = KnownView()
        self._headrooms: dict[Start, _Headroom] = {}
        """Of the workers that stream tokens."""
        self._loads: dict[Start, EngineLoad] = {}
        """The last load that each worker reported, without stale ones."""
        self._request_tokens: list[int] = []
        """`request_tokens` of all workers, ascending."""
        self._requests_max = self._tokens_max = 0
        self._requests = self._tokens = 0
        """In use as the workers report it, by all frontends together."""
        self._before = (0, -math.inf)
        """Requests that fitted the last workers, and when the last of these left."""
        self._reported = (0, 0)
        self._others = (0, 0)
        """Requests and tokens of the other frontends, estimated when the reported load last changed."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Apply a new registry view."""
        requests_before = self._requests_max
        removed, added = self._view.replace(workers)
        for worker in removed:
            if worker.start in self._headrooms:
                self._remove(worker.start)
        for worker in added:
            if self._streams(worker):
                self._add(worker)
        if requests_before and not self._headrooms:
            self._before = requests_before, self._clock()

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """Record a worker's load; None: its last one is stale, or the worker is no longer watched."""
        before = self._loads.pop(start, None)
        if load is not None:
            self._loads[start] = load
        headroom = self._headrooms.get(start)
        if headroom is not None:
            self._count(headroom, before, -1)
            self._count(headroom, load, 1)

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        """KV tokens that a request is charged for: no more than an engine itself reserves for it.

        Clients often leave max_tokens at the whole context. Charged in full, such a request would wait until all
        others have finished, and block the queue meanwhile.
        """
        tokens = prompt_tokens + min(answer_tokens, ANSWER_TOKENS_MAX)
        return min(tokens, self._request_tokens[-1]) if self._request_tokens else tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether one more request fits.

        True without any worker: routing then rejects it with the right error. Except that for `no_worker_wait_s` after
        the last one has left as many fit as before: they wait for its successor, which must not get more at once, and
        the others stay in the queue and its order.

        Args:
            held_requests: requests of this frontend on the workers.
            held_tokens: KV tokens charged for them.
            tokens: KV tokens charged for the new request.
        """
        if not self._headrooms:
            requests, left_s = self._before
            return held_requests < requests or self._clock() - left_s >= self._no_worker_wait_s
        if held_requests == 0:
            # Each frontend may always have one request on the workers, so that none of them ever starves.
            return True
        reported = self._requests, self._tokens
        if reported != self._reported:
            self._reported = reported
            self._others = max(0, reported[0] - held_requests), max(0, reported[1] - held_tokens)
        others_requests, others_tokens = self._others
        requests_max = self._requests_max
        if held_requests < others_requests:
            requests_max += max(1, int(requests_max * FAIR_FRACTION))
        has_tokens = held_tokens + others_tokens + tokens <= self._tokens_max
        return held_requests + others_requests < requests_max and has_tokens

    def others(self, held_requests: int, held_tokens: int) -> tuple[int, int]:
        """Requests and KV tokens that other frontends have on the workers, as far as these report them."""
        return max(0, self._requests - held_requests), max(0, self._tokens - held_tokens)

    def fits_beside(self, requests: int, tokens: int) -> bool:
        """Whether the workers have capacity for so many requests and KV tokens in all; true without any worker."""
        return not self._headrooms or (requests <= self._requests_max and tokens <= self._tokens_max)

    def _add(self, worker: Worker) -> None:
        headroom = self._headrooms[worker.start] = _headroom(worker)
        self._requests_max += headroom.requests
        self._tokens_max += headroom.tokens
        insort(self._request_tokens, headroom.request_tokens)
        # Its load may have been reported before it appeared in the view.
        self._count(headroom, self._loads.get(worker.start), 1)

    def _remove(self, start: Start) -> None:
        headroom = self._headrooms.pop(start)
        self._requests_max -= headroom.requests
        self._tokens_max -= headroom.tokens
        del self._request_tokens[bisect_left(self._request_tokens, headroom.request_tokens)]
        self._count(headroom, self._loads.get(start), -1)

    def _count(self, headroom: _Headroom, load: EngineLoad | None, sign: int) -> None:
        requests, tokens = headroom.used(load)
        self._requests += sign * requests
        self._tokens += sign * tokens

    def _streams(self, worker: Worker) -> bool:
        return (
            worker.role is not WorkerRole.PREFILL
            and worker.state is WorkerState.SERVING
            and worker.leg_contract == LEG_CONTRACT
            and worker.capabilities.model == self._model
        )


def _headroom(worker: Worker) -> _Headroom:
    capabilities = worker.capabilities
    running, tokens = capabilities.running_requests_max, capabilities.kv_capacity_tokens
    requests = running + max(QUEUED_MIN, int(running * QUEUED_FRACTION))
    return _Headroom(requests, tokens, min(capabilities.context_tokens_max, tokens))
