"""Which workers are sent nothing for a while, because they fail what their peers can do.

Pure: the clock is given. A worker is judged among its peers, those of its role that it could stand in for: what strikes
several of them at one moment is no worker's fault, and at most half of them are left out at a time, whatever happens.
A request asks only who is left out, which is determined anew when something has changed; all peers are looked at once
for each moment at most. Whose fault a failure may be at all is `supervision`'s to say, how one breaker opens and closes
`breaker`'s.
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
"""How long it stays open at first, and at most after probes that failed; each drawn from its upper half."""
PROBE_S = 3.0
"""After so long without a verdict a probe makes room for the next one. Longer than a silent leg is waited for."""
FORGIVEN_S = 30.0
"""Closed for so long, the next opening is a first one again."""
RELIEF_S = 1.0
"""Of all that it does well within so long, one strike is taken back: it may fail only a part of its requests."""


class BreakerState(Enum):
    """Whether requests go to a worker."""

    CLOSED = "closed"
    """They do."""
    OPEN = "open"
    """They do not; when its time is over, the next one is a probe."""
    HALF_OPEN = "half-open"
    """A probe is on its way, and nothing else."""


class CircuitBreaker:
    """One worker's."""

    def __init__(self, rng: random.Random) -> None:
        self.state = BreakerState.CLOSED
        self.strikes = 0
        self.strike_s = 0.0
        """When the last one was."""
        self.success_s = float("-inf")
        """When it last did its part of a request."""
        self.until_s = float("-inf")
        """When the next probe may go, unless it is closed."""
        self._backoff = Backoff(first_s=OPEN_FIRST_S, most_s=OPEN_MAX_S, rng=rng)
        self._relief_s = float("-inf")
        self._opened_s = float("-inf")
        self._closed_s = float("-inf")

    def may_take(self, now_s: float) -> bool:
        """Whether a request may go there now."""
        return self.state is BreakerState.CLOSED or now_s >= self.until_s

    def sent(self, now_s: float) -> None:
        """A request has gone there: the probe, if one was due."""
        if self.state is not BreakerState.CLOSED and now_s >= self.until_s:
            self.state = BreakerState.HALF_OPEN
            self.until_s = now_s + PROBE_S

    def succeed(self, now_s: float, sent_s: float) -> bool:
        """It did its part of a request that was sent at a time; whether that closes the breaker."""
        self.success_s = now_s
        if now_s - self._relief_s >= RELIEF_S:
            self.strikes, self._relief_s = max(0, self.strikes - 1), now_s
        if self.state is BreakerState.CLOSED or sent_s < self._opened_s:
            # What ran before it opened and ends well now says nothing of those that would come.
            return False
        self.state, self._closed_s = BreakerState.CLOSED, now_s
        return True

    def fail(self, now_s: float, sent_s: float) -> bool:
        """It failed a request that was sent at a time; whether that was the probe, so that it opens again."""
        if self.state is not BreakerState.HALF_OPEN or sent_s < self._opened_s:
            # One that had nowhere else to go may be sent to an open one too: that is no probe.
            return False
        self.open(now_s)
        return True

    def strike(self, now_s: float) -> None:
        """It has failed, once or often, at a moment at which its peers have not."""
        self.strikes += 1
        self.strike_s = now_s

    def open(self, now_s: float) -> None:
        """Send it nothing for a while: longer each time, until it has been well for long."""
        if self.state is BreakerState.CLOSED and now_s - self._closed_s > FORGIVEN_S:
            self._backoff.reset()
        self.state, self._opened_s = BreakerState.OPEN, now_s
        self.until_s = now_s + self._backoff.next_s()
        self.strikes = 0


log = logging.getLogger(__name__)

MOMENT_S = 1.0
"""Failures within it are one: a connection that breaks takes all its streams along. As long as a worker that has
failed is avoided, so that what strikes all meets more than one of them within it."""
OTHERS_FAILED_SHARE = 1 / 8
"""So many peers may fail at the same moment, and whoever does has a strike all the same; of fewer than 8 none."""
STRIKES_MAX = 3
"""Few, because they take seconds to come."""
EJECTED_SHARE_MAX = 0.5
"""Of a worker and its peers that are healthy."""


@dataclass(slots=True, eq=False)
class _Peers:
    """Workers that can stand in for each other."""

    key: tuple[object, ...]
    """What they have in common."""
    starts: set[Start] = field(default_factory=set)


@dataclass(slots=True)
class _Moment:
    """Who among peers failed at one moment."""

    begin_s: float
    failures: Counter[Start] = field(default_factory=Counter)
    successes: Counter[Start] = field(default_factory=Counter)
    """Of those that have failed too."""


class CircuitBreakers:
    """Of all workers of the view. A new start of a worker begins with a clean sheet."""

    def __init__(
        self, clock: Clock, rng: random.Random, unhealthy: Callable[[], Collection[Start]] = frozenset
    ) -> None:
        """`unhealthy` returns those known not to serve: no worker is left out in their favour."""
        self._clock = clock
        self._rng = rng
        self._unhealthy = unhealthy
        self._view = KnownView()
        self._peers_of: dict[Start, _Peers] = {}
        self._peers: dict[tuple[object, ...], _Peers] = {}
        self._breakers: dict[Start, CircuitBreaker] = {}
        self._tripped: set[Start] = set()
        """Whose breakers are not closed."""
        self._moments: dict[_Peers, _Moment] = {}
        """In the order in which they began."""
        self._ejected: frozenset[Start] = frozenset()
        self._ejected_until_s = math.inf
        """When one of them may take a probe; at once where they are to be determined anew."""
        self._unhealthy_then: Collection[Start] = frozenset()
        """What `_ejected` is based on."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Judge these workers and no others."""
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
            self._moments.pop(peers, None)
        self._ejected_until_s = -math.inf

    def states(self) -> dict[Start, BreakerState]:
        """Of those that are not closed."""
        return {start: self._breakers[start].state for start in self._tripped}

    def ejected(self) -> frozenset[Start]:
        """Those that no request goes to now. One whose next probe is due is not among them.

        The same object as before until something changes.
        """
        now_s = self._clock()
        self._judge_moments(now_s)
        if not self._tripped and not self._ejected:
            return self._ejected
        unhealthy = self._unhealthy()
        # Another kind of collection may have changed although it is the same object.
        is_known = unhealthy is self._unhealthy_then and isinstance(unhealthy, frozenset)
        if now_s >= self._ejected_until_s or not is_known:
            self._unhealthy_then = unhealthy
            found = self._determine(unhealthy, now_s)
            if found != self._ejected:
                self._ejected = found
        return self._ejected

    def _determine(self, unhealthy: Collection[Start], now_s: float) -> frozenset[Start]:
        found = set[Start]()
        unhealthy_counts = Counter(map(self._peers_of.get, unhealthy))
        by_peers: dict[_Peers, list[tuple[float, Start]]] = {}
        for start in self._tripped.difference(unhealthy):
            by_peers.setdefault(self._peers_of[start], []).append((self._breakers[start].until_s, start))
        for peers, tripped in by_peers.items():
            # The fleet may have shrunk since they opened: the one that is due first is let in again.
            tripped.sort(reverse=True)
            closed_to_all = tripped[: _ejected_max(len(peers.starts) - unhealthy_counts[peers])]
            found.update(start for _, start in closed_to_all if not self._breakers[start].may_take(now_s))
        self._ejected_until_s = min((self._breakers[start].until_s for start in found), default=math.inf)
        return frozenset(found)

    def sent(self, workers: Iterable[Worker]) -> float:
        """An attempt has been sent to these: a probe of those that wait for one. Returns when, for its results."""
        now_s = self._clock()
        for worker in workers:
            if worker.start in self._tripped:
                self._breakers[worker.start].sent(now_s)
                self._ejected_until_s = -math.inf
        return now_s

    def succeeded(self, worker: Worker, sent_s: float) -> None:
        """It has done its part of an attempt: prefill, when the KV has come; who streams, when all has come."""
        start, now_s = worker.start, self._clock()
        peers = self._peers_of.get(start)
        if peers is None:
            return
        if self._breaker(start).succeed(now_s, sent_s):
            self._tripped.discard(start)
            self._ejected_until_s = -math.inf
            log.info("worker %s does its work again: its breaker closes", worker.worker_id)
        moment = self._moments.get(peers)
        if moment is not None and start in moment.failures:
            moment.successes[start] += 1

    def failed(self, worker: Worker, sent_s: float) -> None:
        """It has failed an attempt, and neither the request nor a want of room is at fault."""
        start, now_s = worker.start, self._clock()
        self._judge_moments(now_s)
        peers = self._peers_of.get(start)
        if peers is None:
            return
        breaker = self._breaker(start)
        if breaker.fail(now_s, sent_s):
            self._ejected_until_s = -math.inf
            log.warning("worker %s fails still: %.1f s to its next probe", worker.worker_id, breaker.until_s - now_s)
        if breaker.state is BreakerState.CLOSED:
            self._moments.setdefault(peers, _Moment(now_s)).failures[start] += 1

    def _judge_moments(self, now_s: float) -> None:
        """Give strikes for the moments that are over: to each worker that failed alone, while others worked."""
        if not self._moments:
            return
        over = list(takewhile(lambda known: now_s - known[1].begin_s >= MOMENT_S, self._moments.items()))
        for peers, moment in over:
            del self._moments[peers]
            others_count = len(peers.starts) - 1
            if len(moment.failures) - 1 <= others_count * OTHERS_FAILED_SHARE:
                self._judge(peers, moment, now_s)

    def _judge(self, peers: _Peers, moment: _Moment, now_s: float) -> None:
        """Looks at all peers, for their last successes: once in a moment."""
        worked = ((self._breakers[start].success_s, start) for start in peers.starts if start in self._breakers)
        last_two = nlargest(2, worked)
        for start, failures in moment.failures.items():
            if failures <= moment.successes[start] or self._peers_of.get(start) is not peers:
                continue
            breaker = self._breaker(start)
            # While no other one works, a failure says nothing of the worker that fails.
            others_worked = any(success_s >= breaker.strike_s for success_s, other in last_two if other != start)
            if breaker.state is BreakerState.CLOSED and others_worked:
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
            "worker %s is sent nothing for %.1f s: it fails and its peers do not", start[0], breaker.until_s - now_s
        )

    def _breaker(self, start: Start) -> CircuitBreaker:
        if start not in self._breakers:
            self._breakers[start] = CircuitBreaker(self._rng)
        return self._breakers[start]


def _ejected_max(healthy_count: int) -> int:
    """How many of so many may be left out: never all, and none of one that stands alone."""
    return int(healthy_count * EJECTED_SHARE_MAX)


def _peers_key(worker: Worker) -> tuple[object, ...]:
    """Equal for workers that can stand in for each other."""
    capabilities = worker.capabilities
    return worker.role, worker.leg_contract, capabilities.tensor_parallel_size, *pair_key(capabilities)
