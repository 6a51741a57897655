"""Circuit breakers with outlier detection: a worker that fails while its peers succeed is ejected for a while.

Pure: the clock is passed in. A worker is compared with its peers, the workers of its role that could replace it.
Failures of several peers within one interval are no worker's fault, and at most half of the peers are ejected at a
time. A request only reads the set of ejected workers, which is recomputed when something has changed; the peers of a
failed worker are compared at most once per interval. Which failures count against a worker is decided in
`execution.attempt`.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from heapq import nlargest
from itertools import takewhile

from tandem.clock import Clock
from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import Start, Worker, WorkerState, pair_key
from tandem.rpc.backoff import Backoff

OPEN_FIRST_S, OPEN_MAX_S = 1.0, 10.0
"""Open time at first, and at most after failed probes; each drawn from the upper half of its range."""
PROBE_S = 3.0
"""A probe without a result for this long is replaced by another one. Longer than the silence timeout of a leg."""
FORGIVEN_S = 30.0
"""After being closed for this long, the next open time is the first one again."""
RELIEF_S = 1.0
"""Interval in which successes take back one strike at most: a worker may fail only a part of its requests, and a strike
for each success would hide that."""


class BreakerState(Enum):
    """Whether requests are sent to a worker."""

    CLOSED = "closed"
    """All are."""
    OPEN = "open"
    """None are; when the open time is over, the next request is a probe."""
    HALF_OPEN = "half-open"
    """A probe is running, and no other request is sent."""


class CircuitBreaker:
    """The breaker of one worker."""

    def __init__(self, rng: random.Random) -> None:
        self.state = BreakerState.CLOSED
        self.strikes = 0
        self.strike_s = 0.0
        """Time of the last strike."""
        self.success_s = float("-inf")
        """Time of the last success."""
        self.until_s = float("-inf")
        """When the next probe may be sent, unless the breaker is closed."""
        self._backoff = Backoff(first_s=OPEN_FIRST_S, most_s=OPEN_MAX_S, rng=rng)
        self._relief_s = float("-inf")
        self._opened_s = float("-inf")
        self._closed_s = float("-inf")

    def may_take(self, now_s: float) -> bool:
        """Whether a request may be sent now."""
        return self.state is BreakerState.CLOSED or now_s >= self.until_s

    def sent(self, now_s: float) -> None:
        """A request was sent: the probe, if one was due."""
        if self.state is not BreakerState.CLOSED and now_s >= self.until_s:
            self.state = BreakerState.HALF_OPEN
            self.until_s = now_s + PROBE_S

    def succeed(self, now_s: float, sent_s: float) -> bool:
        """Record the success of a request sent at `sent_s`. Returns whether that closes the breaker."""
        self.success_s = now_s
        if now_s - self._relief_s >= RELIEF_S:
            self.strikes, self._relief_s = max(0, self.strikes - 1), now_s
        if self.state is BreakerState.CLOSED or sent_s < self._opened_s:
            # A request from before the opening proves nothing about the worker's present state.
            return False
        self.state, self._closed_s = BreakerState.CLOSED, now_s
        return True

    def fail(self, now_s: float, sent_s: float) -> bool:
        """Record the failure of a request sent at `sent_s`. Returns whether it was the probe, which opens it again."""
        if self.state is not BreakerState.HALF_OPEN or sent_s < self._opened_s:
            # A request without any other route is sent to an open worker too: that is no probe.
            return False
        self.open(now_s)
        return True

    def strike(self, now_s: float) -> None:
        """Record an interval in which the worker failed and its peers did not."""
        self.strikes += 1
        self.strike_s = now_s

    def open(self, now_s: float) -> None:
        """Open for a while: longer each time, unless it had been closed for FORGIVEN_S."""
        if self.state is BreakerState.CLOSED and now_s - self._closed_s > FORGIVEN_S:
            self._backoff.reset()
        self.state, self._opened_s = BreakerState.OPEN, now_s
        self.until_s = now_s + self._backoff.next_s()
        self.strikes = 0


log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Failures of a worker within it count once: a broken connection fails all of its streams together. As long as a worker
that refused a leg is avoided, so that a fault that affects all workers shows on more than one of them within it."""
OTHERS_FAILED_SHARE = 1 / 8
"""Fraction of the peers that may fail in the same interval without excusing a worker; with fewer than 8 peers, none."""
STRIKES_MAX = 3
"""Strikes that open a breaker. Few, because each takes an interval."""
EJECTED_SHARE_MAX = 0.5
"""Of a worker and its healthy peers."""


@dataclass(slots=True, eq=False)
class _Peers:
    """Workers that can replace each other."""

    key: tuple[object, ...]
    """What they have in common; see `_peers_key`."""
    starts: set[Start] = field(default_factory=set)


@dataclass(slots=True)
class _Interval:
    """Results of the peers that failed within one interval."""

    begin_s: float
    failures: Counter[Start] = field(default_factory=Counter)
    successes: Counter[Start] = field(default_factory=Counter)
    """Only of workers in `failures`."""


class CircuitBreakers:
    """The breakers of all workers of the view. A restarted worker begins with a closed one."""

    def __init__(
        self, clock: Clock, rng: random.Random, unhealthy: Callable[[], Collection[Start]] = frozenset
    ) -> None:
        """`unhealthy` returns the workers that fail health checks: they are no replacement for an ejected one."""
        self._clock = clock
        self._rng = rng
        self._unhealthy = unhealthy
        self._view = KnownView()
        self._peers_of: dict[Start, _Peers] = {}
        self._peers: dict[tuple[object, ...], _Peers] = {}
        self._breakers: dict[Start, CircuitBreaker] = {}
        self._tripped: set[Start] = set()
        """Workers whose breakers are open or half-open."""
        self._intervals: dict[_Peers, _Interval] = {}
        """In the order in which they began."""
        self._ejected: frozenset[Start] = frozenset()
        self._ejected_until_s = math.inf
        """When the next probe of an ejected worker is due; -inf: `_ejected` must be recomputed."""
        self._unhealthy_then: Collection[Start] = frozenset()
        """The unhealthy workers that `_ejected` was computed with."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Watch these workers and no others."""
        removed, added = self._view.replace(workers)
        for worker in removed:
            peers = self._peers_of.pop(worker.start, None)
            if peers is not None:
                peers.starts.discard(worker.start)
        for worker in added:
            if worker.state is WorkerState.SERVING:
                peers = self._peers_of[worker.start] = self._peers.setdefault(key := _peers_key(worker), _Peers(key))
                peers.starts.add(worker.start)
        for worker in removed:
            if worker.start not in self._peers_of:
                self._breakers.pop(worker.start, None)
                self._tripped.discard(worker.start)
        for peers in [peers for peers in self._peers.values() if not peers.starts]:
            del self._peers[peers.key]
            self._intervals.pop(peers, None)
        self._ejected_until_s = -math.inf

    def states(self) -> dict[Start, BreakerState]:
        """The breakers that are not closed."""
        return {start: self._breakers[start].state for start in self._tripped}

    def ejected(self) -> frozenset[Start]:
        """Workers that get no request now. One whose next probe is due is not among them.

        Returns the same object as before until something changes, so that callers can compare by identity.
        """
        now_s = self._clock()
        self._judge_intervals(now_s)
        if not self._tripped and not self._ejected:
            return self._ejected
        unhealthy = self._unhealthy()
        # Only a frozenset cannot have changed while being the same object.
        is_known = unhealthy is self._unhealthy_then and isinstance(unhealthy, frozenset)
        if now_s >= self._ejected_until_s or not is_known:
            self._unhealthy_then = unhealthy
            found = self._compute_ejected(unhealthy, now_s)
            if found != self._ejected:
                self._ejected = found
        return self._ejected

    def _compute_ejected(self, unhealthy: Collection[Start], now_s: float) -> frozenset[Start]:
        found = set[Start]()
        unhealthy_counts = Counter(map(self._peers_of.get, unhealthy))
        by_peers: dict[_Peers, list[tuple[float, Start]]] = {}
        for start in self._tripped.difference(unhealthy):
            by_peers.setdefault(self._peers_of[start], []).append((self._breakers[start].until_s, start))
        for peers, tripped in by_peers.items():
            # The fleet may have shrunk since they opened: beyond the limit, those whose probe is due first are used.
            tripped.sort(reverse=True)
            candidates = tripped[: _ejected_max(len(peers.starts) - unhealthy_counts[peers])]
            found.update(start for _, start in candidates if not self._breakers[start].may_take(now_s))
        self._ejected_until_s = min((self._breakers[start].until_s for start in found), default=math.inf)
        return frozenset(found)

    def sent(self, workers: Iterable[Worker]) -> float:
        """Record that an attempt was sent to these workers; where a probe is due, it is the probe.

        Returns:
            The time, to be passed on with the attempt's result.
        """
        now_s = self._clock()
        for worker in workers:
            if worker.start in self._tripped:
                self._breakers[worker.start].sent(now_s)
                self._ejected_until_s = -math.inf
        return now_s

    def succeeded(self, worker: Worker, sent_s: float) -> None:
        """Record a success: of prefill when its KV has arrived, of the streaming worker when its stream is complete."""
        start, now_s = worker.start, self._clock()
        peers = self._peers_of.get(start)
        if peers is None:
            return
        if self._breaker(start).succeed(now_s, sent_s):
            self._tripped.discard(start)
            self._ejected_until_s = -math.inf
            log.info("circuit breaker closed for worker %s: its probe succeeded", worker.worker_id)
        interval = self._intervals.get(peers)
        if interval is not None and start in interval.failures:
            interval.successes[start] += 1

    def failed(self, worker: Worker, sent_s: float) -> None:
        """Record a failure that neither the request nor a lack of capacity explains."""
        start, now_s = worker.start, self._clock()
        self._judge_intervals(now_s)
        peers = self._peers_of.get(start)
        if peers is None:
            return
        breaker = self._breaker(start)
        if breaker.fail(now_s, sent_s):
            self._ejected_until_s = -math.inf
            log.warning(
                "circuit breaker stays open for worker %s: its probe failed, next probe in %.1f s",
                worker.worker_id, breaker.until_s - now_s,
            )  # fmt: skip
        if breaker.state is BreakerState.CLOSED:
            self._intervals.setdefault(peers, _Interval(now_s)).failures[start] += 1

    def _judge_intervals(self, now_s: float) -> None:
        """Evaluate the intervals that are over, except those in which too many peers failed together."""
        if not self._intervals:
            return
        over = list(takewhile(lambda known: now_s - known[1].begin_s >= INTERVAL_S, self._intervals.items()))
        for peers, interval in over:
            del self._intervals[peers]
            others_count = len(peers.starts) - 1
            if len(interval.failures) - 1 <= others_count * OTHERS_FAILED_SHARE:
                self._judge(peers, interval, now_s)

    def _judge(self, peers: _Peers, interval: _Interval, now_s: float) -> None:
        """Give a strike to each worker that mostly failed while a peer succeeded. Iterates over all peers."""
        successes = ((self._breakers[start].success_s, start) for start in peers.starts if start in self._breakers)
        # Two, because the latest success may be that of the worker itself.
        last_two = nlargest(2, successes)
        for start, failures in interval.failures.items():
            if failures <= interval.successes[start] or self._peers_of.get(start) is not peers:
                continue
            breaker = self._breaker(start)
            # Without a peer that succeeded since the last strike, the cause may lie outside of the worker.
            peers_succeed = any(success_s >= breaker.strike_s for success_s, other in last_two if other != start)
            if breaker.state is BreakerState.CLOSED and peers_succeed:
                breaker.strike(now_s)
                if breaker.strikes >= STRIKES_MAX:
                    self._open(start, peers, now_s)

    def _open(self, start: Start, peers: _Peers, now_s: float) -> None:
        unhealthy = self._unhealthy()
        healthy = peers.starts.difference(unhealthy) | {start}
        if len(healthy & self._tripped) + 1 > _ejected_max(len(healthy)):
            return
        breaker = self._breaker(start)
        breaker.open(now_s)
        self._tripped.add(start)
        self._ejected_until_s = -math.inf
        log.warning(
            "circuit breaker opened for worker %s (%.1f s): it failed while its peers succeeded",
            start[0], breaker.until_s - now_s,
        )  # fmt: skip

    def _breaker(self, start: Start) -> CircuitBreaker:
        if start not in self._breakers:
            self._breakers[start] = CircuitBreaker(self._rng)
        return self._breakers[start]


def _ejected_max(healthy_count: int) -> int:
    """How many of `healthy_count` workers may be ejected: never all of them, so none where there is only one."""
    return int(healthy_count * EJECTED_SHARE_MAX)


def _peers_key(worker: Worker) -> tuple[object, ...]:
    """Equal for workers that can replace each other."""
    capabilities = worker.capabilities
    return worker.role, worker.leg_contract, capabilities.tensor_parallel_size, *pair_key(capabilities)
