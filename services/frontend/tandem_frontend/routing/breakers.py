"""Which workers are sent nothing for a while, because they fail what their peers can do.

Pure: the clock is given. A worker is judged among its peers, those of its role that it could stand in for: what strikes
several of them at one moment is nobody's fault, and at most half of them are left out at a time, whatever happens.
Whose fault a failure may be at all is `supervision`'s to say, how one breaker opens and closes `breaker`'s.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from tandem.model.worker import PAIR_FIELDS, Start, Worker, WorkerState
from tandem.runtime.clock import Clock
from tandem_frontend.routing.breaker import Breaker, BreakerState

log = logging.getLogger(__name__)

MOMENT_S = 1.0
"""Failures within it are one: a connection that breaks takes all its streams along. As long as a worker that has
failed is avoided, so that what strikes all meets more than one of them within it."""
OTHERS_FAILED_SHARE = 1 / 8
"""So many peers may fail at the same moment, and whoever does has a strike all the same; of fewer than 8 none."""
STRIKES_MAX = 3
"""Few, because they take seconds to come."""
LEFT_OUT_SHARE_MAX = 0.5
"""Of a worker and its peers that are healthy."""

Peers = tuple[object, ...]
"""What they have in common."""


@dataclass(slots=True)
class _Moment:
    """Who among peers failed at one moment."""

    begin_s: float
    failures: Counter[Start] = field(default_factory=Counter)
    successes: Counter[Start] = field(default_factory=Counter)
    """Of those that have failed too."""


class Breakers:
    """Of all workers of the view. A new start of a worker begins with a clean sheet."""

    def __init__(
        self, clock: Clock, rng: random.Random, unhealthy: Callable[[], Collection[Start]] = frozenset
    ) -> None:
        """`unhealthy` tells who is known not to serve: nobody is left out in their favour."""
        self._clock = clock
        self._rng = rng
        self._unhealthy = unhealthy
        self._peers_of: dict[Start, Peers] = {}
        self._among: dict[Peers, tuple[Start, ...]] = {}
        self._breakers: dict[Start, Breaker] = {}
        self._tripped: set[Start] = set()
        """Whose breakers are not closed."""
        self._moments: dict[Peers, _Moment] = {}

    def follow(self, workers: Iterable[Worker]) -> None:
        """Judge these workers and nobody else."""
        self._peers_of = {worker.start: _peers(worker) for worker in workers if worker.state is WorkerState.SERVING}
        among: dict[Peers, list[Start]] = {}
        for start, peers in self._peers_of.items():
            among.setdefault(peers, []).append(start)
        self._among = {peers: tuple(starts) for peers, starts in among.items()}
        self._breakers = {start: kept for start, kept in self._breakers.items() if start in self._peers_of}
        self._tripped &= self._peers_of.keys()

    def states(self) -> dict[Start, BreakerState]:
        """Of those that are not closed."""
        return {start: self._breakers[start].state for start in self._tripped}

    def left_out(self) -> frozenset[Start]:
        """Those that no request goes to now. One whose next probe is due is not among them."""
        now_s = self._clock()
        self._judge_moments(now_s)
        if not self._tripped:
            return frozenset()
        unhealthy, found = self._unhealthy(), set[Start]()
        for peers in {self._peers_of[start] for start in self._tripped}:
            tripped = [start for start in self._among[peers] if start in self._tripped]
            # The fleet may have shrunk since they opened: whoever is due first is let in again.
            tripped.sort(key=lambda start: self._breakers[start].until_s, reverse=True)
            most = self._left_out_max(peers, unhealthy)
            closed_to_all = [start for start in tripped if start not in unhealthy][:most]
            found.update(start for start in closed_to_all if not self._breakers[start].may_take(now_s))
        return frozenset(found)

    def sent(self, workers: Iterable[Worker]) -> float:
        """An attempt has been sent to these: a probe of those that wait for one. Returns when, for its results."""
        now_s = self._clock()
        for worker in workers:
            if worker.start in self._tripped:
                self._breakers[worker.start].sent(now_s)
        return now_s

    def succeeded(self, worker: Worker, sent_s: float) -> None:
        """It has done its part of an attempt: prefill, when the KV has come; who streams, when all has come."""
        start, now_s = worker.start, self._clock()
        peers = self._peers_of.get(start)
        if peers is None:
            return
        if self._breaker(start).succeed(now_s, sent_s):
            self._tripped.discard(start)
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
            log.warning("worker %s fails still: %.1f s to its next probe", worker.worker_id, breaker.until_s - now_s)
        if breaker.state is BreakerState.CLOSED:
            self._moments.setdefault(peers, _Moment(now_s)).failures[start] += 1

    def _judge_moments(self, now_s: float) -> None:
        """Give strikes for the moments that are over: to whoever failed alone, while others worked."""
        over = [peers for peers, moment in self._moments.items() if now_s - moment.begin_s >= MOMENT_S]
        for peers in over:
            moment = self._moments.pop(peers)
            others = len(self._among.get(peers, ())) - 1
            if len(moment.failures) - 1 > others * OTHERS_FAILED_SHARE:
                continue
            for start, failures in moment.failures.items():
                if failures > moment.successes[start] and self._peers_of.get(start) == peers:
                    self._strike(start, peers, now_s)

    def _strike(self, start: Start, peers: Peers, now_s: float) -> None:
        breaker = self._breaker(start)
        # While nobody works, a failure says nothing of who fails.
        if breaker.state is BreakerState.CLOSED and self._others_worked_since(start, peers, breaker.strike_s):
            breaker.strike(now_s)
            if breaker.strikes >= STRIKES_MAX:
                self._open(start, peers, now_s)

    def _open(self, start: Start, peers: Peers, now_s: float) -> None:
        unhealthy = self._unhealthy()
        others = sum(peer in self._tripped and peer not in unhealthy for peer in self._among[peers] if peer != start)
        if others + 1 > self._left_out_max(peers, unhealthy, but=start):
            return
        breaker = self._breaker(start)
        breaker.open(now_s)
        self._tripped.add(start)
        log.warning(
            "worker %s is sent nothing for %.1f s: it fails and its peers do not", start[0], breaker.until_s - now_s
        )

    def _left_out_max(self, peers: Peers, unhealthy: Collection[Start], but: Start | None = None) -> int:
        """How many of these may be left out: never all, and none of whoever stands alone."""
        healthy = sum(start == but or start not in unhealthy for start in self._among[peers])
        return int(healthy * LEFT_OUT_SHARE_MAX)

    def _others_worked_since(self, start: Start, peers: Peers, since_s: float) -> bool:
        others = [self._breakers[peer] for peer in self._among[peers] if peer != start and peer in self._breakers]
        return any(other.success_s >= since_s for other in others)

    def _breaker(self, start: Start) -> Breaker:
        if start not in self._breakers:
            self._breakers[start] = Breaker(self._rng)
        return self._breakers[start]


def _peers(worker: Worker) -> Peers:
    """Equal for workers that can stand in for each other."""
    capabilities = worker.capabilities
    return worker.role, capabilities.tensor_parallel_size, *(getattr(capabilities, name) for name in PAIR_FIELDS)
