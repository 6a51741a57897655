"""Who serves an attempt: the registry's view, what has been tried, and the policy come together here.

Owns the order in which routes are preferred. What is possible at all is `candidates`, the choice among equals
`random_choice`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from tandem.errors import ContextExceeded, IncompatibleWorkers, NoWorkers
from tandem.model.worker import Start, Worker
from tandem_frontend.models import ServedModel
from tandem_frontend.routing.breakers import Breakers
from tandem_frontend.routing.candidates import Candidate, Pick, Route, able_to_hold, candidates, without
from tandem_frontend.routing.random_choice import POLICY, choose
from tandem_frontend.routing.refusals import Refusals

NAMED_MAX = 8
"""Candidates of a role that are told by name."""


class Routes:
    """Chooses routes for the requests of one model."""

    def __init__(
        self,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        unhealthy: Callable[[], Collection[Start]],
        refusals: Refusals,
        breakers: Breakers,
        rng: random.Random,
    ) -> None:
        """`workers` tells the present view of the registry, `unhealthy` who of them is better left alone."""
        self._model = model
        self._workers = workers
        self._unhealthy = unhealthy
        self._refusals = refusals
        self._breakers = breakers
        self._rng = rng

    def first(self, prompt_tokens: int) -> Route:
        """The route of a request's first attempt.

        Raises:
            NoWorkers, IncompatibleWorkers, ContextExceeded
        """
        return self._preferred(self._possible(prompt_tokens), ())

    def next(self, prompt_tokens: int, tried: Collection[Start], refused: Collection[Start]) -> Route | None:
        """The route of another attempt; None when there is none without a worker that refused the request.

        Args:
            prompt_tokens: length of the prompt.
            tried: all workers of the attempts before; others are preferred.
            refused: those among them that did not take their leg.
        """
        try:
            possible = self._possible(prompt_tokens)
        except (NoWorkers, IncompatibleWorkers, ContextExceeded):
            return None
        left = without(possible, refused)
        return self._preferred(left, tried) if left else None

    def _possible(self, prompt_tokens: int) -> tuple[Candidate, ...]:
        possible = candidates(self._workers(), self._model.name, self._model.tokenizer.digest)
        return able_to_hold(possible, prompt_tokens)

    def _preferred(self, possible: Sequence[Candidate], tried: Collection[Start]) -> Route:
        every, left_out = possible, list[str]()
        avoiding = {
            "unhealthy": self._unhealthy(),
            "failing": self._breakers.left_out(),
            "refused": self._refusals.recent(),
            "tried": tried,
        }
        for name, avoided in avoiding.items():
            if avoided:
                before, possible = possible, without(possible, avoided) or possible
                left_out += [name] if possible != before else []
        route = choose(possible, self._rng)
        return replace(route, pick=_pick(every, possible, left_out))


def _pick(every: Sequence[Candidate], left: Sequence[Candidate], left_out: Sequence[str]) -> Pick:
    """What can be told of a choice; bounded, because a fleet has a million pairs."""
    count, left_count = (sum(len(candidate.prefills) or 1 for candidate in some) for some in (every, left))
    names = [candidate.decode.worker_id for candidate in every[:NAMED_MAX]]
    names += [prefill.worker_id for prefill in every[0].prefills[:NAMED_MAX]]
    without_them = f", without {' and '.join(left_out)} ones" if left_out else ""
    return Pick(count, " ".join(names), POLICY, f"{POLICY} among {left_count} of {count}{without_them}")
