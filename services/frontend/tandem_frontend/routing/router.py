"""Who serves an attempt: the registry's view, what has been tried, and the policy come together here.

Owns the order in which routes are preferred. What is possible at all is `pools`', the choice among equals the policy's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tandem.clock import Clock
from tandem.domain.worker import Start, Worker
from tandem.errors import ContextExceeded
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Pick, Route
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.policy import Policy
from tandem_frontend.routing.pool import FAILING, KEPT_MAX, REFUSED, UNHEALTHY
from tandem_frontend.routing.pools import Pools, Selection
from tandem_frontend.routing.random_policy import RandomPolicy

AVOIDED_S = 1.0


class RecentRefusals:
    """Remembers starts of workers for a short while. A new start of the same worker begins with a clean sheet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[Start, float] = {}
        """In order of time."""
        self._recent: frozenset[Start] | None = frozenset()
        """The keys of `_until_s`; None: they have changed since."""

    def note(self, worker: Worker) -> None:
        """It has not taken a leg."""
        if self._until_s.pop(worker.start, None) is None:
            self._recent = None
        self._until_s[worker.start] = self._clock() + AVOIDED_S

    def recent(self) -> frozenset[Start]:
        """Those to be avoided now; the same object until one comes or goes."""
        if self._until_s:
            self._forget(self._clock())
        if self._recent is None:
            self._recent = frozenset(self._until_s)
        return self._recent

    def _forget(self, now_s: float) -> None:
        while self._until_s:
            start = next(iter(self._until_s))
            if self._until_s[start] > now_s:
                return
            del self._until_s[start]
            self._recent = None


NAMED_MAX = 8
"""Candidates of a role that a trace names."""
AVOIDED = ((UNHEALTHY, "unhealthy"), (FAILING, "failing"), (REFUSED, "refused"))
"""Marks in the order in which they are avoided, with their names in a trace; `tried` comes after them."""


@dataclass(frozen=True, slots=True)
class _Preferred:
    """What a policy chooses from, and how a trace describes it."""

    selection: Selection
    pick: Pick


class Routes:
    """Chooses routes for the requests of one model."""

    def __init__(
        self,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        unhealthy: Callable[[], Collection[Start]],
        refusals: RecentRefusals,
        breakers: CircuitBreakers,
        rng: random.Random,
        policy: Policy | None = None,
    ) -> None:
        """`workers` returns the present view of the registry, `unhealthy` those of them that are better avoided.

        Both are called for each choice and cost nothing then where they return the same object as before. Without a
        `policy` workers are drawn by `rng`.
        """
        self._workers = workers
        self._unhealthy = unhealthy
        self._refusals = refusals
        self._breakers = breakers
        self._policy: Policy = policy or RandomPolicy(rng)
        self._pools = Pools(model.name, model.tokenizer.digest)
        self._view: tuple[Worker, ...] = ()
        self._version = self._pools.version
        self._first: dict[int, _Preferred] = {}
        """For first attempts, by the rank of the prompt; as of `_version`."""

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Take another view at once; else the next choice would have to."""
        self._view = workers
        self._pools.follow(workers)

    def first(self, prompt_tokens: int) -> Route:
        """The route of a request's first attempt.

        Raises:
            NoWorkers, IncompatibleWorkers, ContextExceeded
        """
        self._refresh()
        rank = self._pools.rank(prompt_tokens)
        preferred = self._first.get(rank)
        if preferred is None:
            if len(self._first) >= KEPT_MAX:
                self._first.clear()
            preferred = self._first[rank] = self._prefer(self._possible(prompt_tokens), ())
        return self._choose(preferred)

    def next(self, prompt_tokens: int, tried: Collection[Start], refused: Collection[Start]) -> Route | None:
        """The route of another attempt; None when there is none without a worker that refused the request.

        Args:
            prompt_tokens: length of the prompt.
            tried: all workers of the attempts before; others are preferred.
            refused: those among them that did not take their leg.
        """
        self._refresh()
        possible = self._pools.selection(prompt_tokens).without(refused)
        return self._choose(self._prefer(possible, tried)) if possible.routes_count else None

    def _refresh(self) -> None:
        """Bring the pools up to date. Nothing in here looks at all workers unless something has changed."""
        workers = self._workers()
        if workers is not self._view:
            self.follow(workers)
        pools = self._pools
        pools.mark(UNHEALTHY, self._unhealthy())
        pools.mark(FAILING, self._breakers.ejected())
        pools.mark(REFUSED, self._refusals.recent())
        if pools.version != self._version:
            self._version = pools.version
            self._first.clear()

    def _possible(self, prompt_tokens: int) -> Selection:
        possible = self._pools.selection(prompt_tokens)
        if possible.routes_count:
            return possible
        limit = self._pools.context_tokens_max()
        if limit is None:
            raise self._pools.why_none()
        raise ContextExceeded(
            "token_ids", f"{prompt_tokens} tokens leave no room in the {limit} that the engines take now", limit=limit
        )

    def _prefer(self, every: Selection, tried: Collection[Start]) -> _Preferred:
        """Avoid what is better avoided, one kind after the other, as long as something is left."""
        left, ejected = every, list[str]()
        for mark, name in AVOIDED:
            if self._pools.has_marked(mark):
                left = _narrowed(left, left.avoiding(mark), name, ejected)
        if tried:
            left = _narrowed(left, left.without(tried), "tried", ejected)
        return _Preferred(left, _pick(every, left, ejected, self._policy.name))

    def _choose(self, preferred: _Preferred) -> Route:
        selection = preferred.selection
        stream = self._policy.choose(selection.streams)
        prefills = selection.prefills(stream)
        prefill = None if prefills is None else self._policy.choose(prefills)
        return Route(decode=stream, prefill=prefill, pick=preferred.pick)


def _narrowed(left: Selection, narrower: Selection, name: str, ejected: list[str]) -> Selection:
    """The narrower selection unless it is empty; its name is noted where it leaves something out."""
    if not narrower.routes_count or narrower.routes_count == left.routes_count:
        return left
    ejected.append(name)
    return narrower


def _pick(every: Selection, left: Selection, ejected: list[str], policy: str) -> Pick:
    """What a trace says of a choice; bounded, because a fleet has a million pairs."""
    count, left_count = every.routes_count, left.routes_count
    without_them = f", without {' and '.join(ejected)} ones" if ejected else ""
    return Pick(
        count, " ".join(every.names(NAMED_MAX)), policy, f"{policy} among {left_count} of {count}{without_them}"
    )
