"""The router: selects the workers of each attempt from the registry's view and the attempts before.

Owns the order of preference: avoid unhealthy workers, open circuit breakers, recent refusals, workers tried before.
`pools` knows the possible routes, the policy picks among equals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from tandem.clock import Clock
from tandem.domain.placement import Placement
from tandem.domain.worker import Start, Worker
from tandem.errors import ContextExceeded, NoWorkers, ServiceError
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.routing.candidates import Explain, Pick, Route, why_none
from tandem_frontend.routing.circuit_breaker import CircuitBreakers
from tandem_frontend.routing.local_prefill import LocalPrefill
from tandem_frontend.routing.policy import Job, Policy, RoutingRequest
from tandem_frontend.routing.pool import FAILING, KEPT_MAX, REFUSED, UNHEALTHY
from tandem_frontend.routing.pools import Pools, Selection
from tandem_frontend.routing.random_policy import RandomPolicy
from tandem_frontend.routing.worker_costs import SentRequest, WorkerCosts

AVOIDED_S = 1.0
"""How long a worker that refused a leg is avoided."""


class RecentRefusals:
    """Workers that refused a leg lately. A restarted worker is not among them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_s: dict[Start, float] = {}
        """In ascending order."""
        self._recent: frozenset[Start] | None = frozenset()
        """The keys of `_until_s`; None: to be recomputed."""

    def note(self, worker: Worker) -> None:
        """Record that a worker did not accept a leg."""
        if self._until_s.pop(worker.start, None) is None:
            self._recent = None
        self._until_s[worker.start] = self._clock() + AVOIDED_S

    def recent(self) -> frozenset[Start]:
        """Workers to be avoided now; the same object until the set changes."""
        if self._until_s:
            self._expire(self._clock())
        if self._recent is None:
            self._recent = frozenset(self._until_s)
        return self._recent

    def _expire(self, now_s: float) -> None:
        while self._until_s:
            start = next(iter(self._until_s))
            if self._until_s[start] > now_s:
                return
            del self._until_s[start]
            self._recent = None


NAMED_MAX = 8
"""Candidates of each role in a trace."""
AVOIDED = ((UNHEALTHY, "unhealthy"), (FAILING, "failing"), (REFUSED, "refused"))
"""Marks in the order in which they are avoided, with their names in a trace; `tried` comes last."""


@dataclass(slots=True)
class _Preferred:
    """The routes that the policy picks from, and their description for traces."""

    selection: Selection
    candidates_count: int
    candidates: str
    among: str
    """The description but for the policy's name."""
    _picks: dict[str, Pick] = field(default_factory=dict)

    def pick(self, policy: str) -> Pick:
        """The description of a choice by a policy; `auto` may choose by two."""
        known = self._picks.get(policy)
        if known is None:
            known = Pick(self.candidates_count, self.candidates, policy, f"{policy} among {self.among}")
            self._picks[policy] = known
        return known


class Routes:
    """Selects routes for the requests of one model."""

    def __init__(
        self,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        unhealthy: Callable[[], Collection[Start]],
        refusals: RecentRefusals,
        breakers: CircuitBreakers,
        rng: random.Random,
        policy: Policy | None = None,
        costs: WorkerCosts | None = None,
        local: LocalPrefill | None = None,
        *,
        explain: Explain = why_none,
        leads: bool = True,
    ) -> None:
        """`workers` returns the registry's view, `unhealthy` the workers that fail health checks.

        Both are called for each selection, which is cheap while they return the same object as before. Without a
        `policy` workers are picked at random by `rng`. `costs` are those that the policy reads. `local` decides between
        pairs and aggregated workers; without it the policy picks among all of them. `explain` makes the error of a view
        without a route. `leads`: `costs` and `local` get their view from here; else from the routes of the whole model.
        """
        self._workers = workers
        self._unhealthy = unhealthy
        self._refusals = refusals
        self._breakers = breakers
        self._policy: Policy = policy or RandomPolicy(rng)
        self._costs = costs or WorkerCosts(PrefillBacklog(model.name, math.inf))
        self._local = local
        self._pools = Pools(model.name, model.tokenizer.digest, explain)
        self._leads = leads
        self._view: tuple[Worker, ...] = ()
        self._version = self._pools.version
        self._first: dict[int, _Preferred] = {}
        """Cache for first attempts, by the rank of the prompt; valid for `_version`."""

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Apply a new view now; otherwise the next request would pay for it."""
        self._view = workers
        self._pools.follow(workers)
        if self._leads:
            self._costs.follow(workers)
            if self._local is not None:
                self._local.follow(workers)

    def sent(self, route: Route, prompt_tokens: int) -> SentRequest:
        """Count an attempt that is being sent to the workers of a route, until it is ended."""
        cached_tokens = route.expected_cached_tokens or 0
        sent = self._costs.sent(route.computing, route.decode, prompt_tokens, cached_tokens)
        if self._local is not None:
            sent.on_end = self._local.sent(route, prompt_tokens)
        return sent

    def first(self, request: RoutingRequest, others: Collection[Start] = ()) -> Route:
        """The route of a request's first attempt; `others` have other weights than those that must compute it.

        Raises:
            NoWorkers, IncompatibleWorkers, ContextExceeded
        """
        self._refresh()
        prompt_tokens = request.prompt_tokens
        if others:
            possible = self._possible(prompt_tokens).without(others)
            if not possible.routes_count:
                digest = request.model_digest
                what = f"no worker has the weights that this call began with ({digest[:12]})"
                raise NoWorkers(what, model_digest=digest)
            return self._choose(self._prefer(possible, ()), request)
        rank = self._pools.rank(prompt_tokens)
        preferred = self._first.get(rank)
        if preferred is None:
            if len(self._first) >= KEPT_MAX:
                self._first.clear()
            preferred = self._first[rank] = self._prefer(self._possible(prompt_tokens), ())
        return self._choose(preferred, request)

    def next(self, request: RoutingRequest, tried: Collection[Start], refused: Collection[Start]) -> Route | None:
        """The route of another attempt; None when every route contains a worker of `refused`.

        Args:
            request: the request, whose prompt has all tokens sent so far.
            tried: all workers of the attempts before; others are preferred.
            refused: workers that must not be used again, because they failed this request.
        """
        self._refresh()
        possible = self._pools.selection(request.prompt_tokens).without(refused)
        return self._choose(self._prefer(possible, tried), request) if possible.routes_count else None

    def has_any(self) -> bool:
        """Whether there is a route for some request, whatever its length."""
        self._refresh()
        return self._pools.context_tokens_max() is not None

    def problem(self) -> ServiceError | None:
        """Why there is no route for any request; None: there is one."""
        return None if self.has_any() else self._pools.why_none()

    def embeds(self) -> bool | None:
        """Whether the model computes embeddings, and generates nothing; None: it has had no worker yet."""
        self._refresh()
        return self._pools.embeds

    def unhealthy(self) -> Collection[Start]:
        """Workers that fail health checks now."""
        return self._unhealthy()

    def with_other_weights(self, model_digest: str) -> frozenset[Start]:
        """Workers whose weights differ from those of a stream: they must not continue it."""
        self._refresh()
        return self._pools.with_other_weights(model_digest)

    def _refresh(self) -> None:
        """Update the pools. Iterates over workers only where something has changed: it runs for every request."""
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
            "token_ids",
            f"prompt of {prompt_tokens} tokens and one new token exceed the {limit} tokens that the workers accept",
            limit=limit,
        )

    def _prefer(self, every: Selection, tried: Collection[Start]) -> _Preferred:
        """Exclude one kind of avoided worker after the other, as long as any route is left."""
        left, ejected = every, list[str]()
        for mark, name in AVOIDED:
            if self._pools.has_marked(mark):
                left = _narrowed(left, left.avoiding(mark), name, ejected)
        if tried:
            left = _narrowed(left, left.without(tried), "tried", ejected)
        return _described(every, left, ejected)

    def _choose(self, preferred: _Preferred, request: RoutingRequest) -> Route:
        """Choose among the preferred routes: first the kind, where there are two and a rule, then the workers."""
        selection = preferred.selection
        if self._local is None or not self._pools.is_mixed:
            return self._pick(preferred, selection, request)
        pairs, aggregated = selection.kinds()
        if pairs.routes_count and aggregated.routes_count:
            alone = self._pick(preferred, aggregated, request)
            return self._local.place(request.prompt_tokens, alone, lambda: self._pick(preferred, pairs, request))
        left, placement = (pairs, Placement.NO_AGGREGATED) if pairs.routes_count else (aggregated, Placement.NO_PAIR)
        return replace(self._pick(preferred, left, request), placement=placement)

    def _pick(self, preferred: _Preferred, selection: Selection, request: RoutingRequest) -> Route:
        """Pick workers by the policy, from a part of the preferred routes."""
        first_job = Job.STREAM if selection.has_pairs else Job.COMPUTE
        stream = self._policy.choose(selection.streams, request, first_job)
        prefills = selection.prefills(stream.worker)
        computing = stream if prefills is None else self._policy.choose(prefills, request, Job.COMPUTE)
        return Route(
            decode=stream.worker,
            prefill=None if prefills is None else computing.worker,
            pick=preferred.pick(computing.policy),
            expected_cached_tokens=computing.expected_cached_tokens,
        )


def _narrowed(left: Selection, narrower: Selection, name: str, ejected: list[str]) -> Selection:
    """The narrower selection unless it is empty; its name is recorded where it excludes a route."""
    if not narrower.routes_count or narrower.routes_count == left.routes_count:
        return left
    ejected.append(name)
    return narrower


def _described(every: Selection, left: Selection, ejected: list[str]) -> _Preferred:
    """A selection with its description for traces; bounded, because a fleet can have a million pairs."""
    count, left_count = every.routes_count, left.routes_count
    without_them = f", without {' and '.join(ejected)} ones" if ejected else ""
    return _Preferred(left, count, " ".join(every.names(NAMED_MAX)), f"{left_count} of {count}{without_them}")
