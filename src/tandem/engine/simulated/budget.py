"""Admission budget of a prefill step: SGLang's estimate of the memory that the admitted legs will still need.

Arithmetic only: reads the pool and never changes it. The scheduler allocates what is promised here.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg

COUNTED_NEW_TOKENS_MAX = 4096
"""Upper bound of the new tokens counted per leg, as in SGLang."""
RATIO_MIN_SHARE = 0.14
RATIO_DECAY_STEPS = 600
RETRACT_STEPS = 20


class NewTokenRatio:
    """Estimated share of their token budgets that legs will emit: decays with each step, rises at a retraction."""

    def __init__(self, initial: float) -> None:
        self._initial = initial
        self._lowest = initial * RATIO_MIN_SHARE
        self.value = initial

    def decay(self) -> None:
        """Lower the estimate after a decode step without a retraction."""
        self.value = max(self._lowest, self.value - (self._initial - self._lowest) / RATIO_DECAY_STEPS)

    def reset(self) -> None:
        """Return to the initial estimate; called when the engine is idle."""
        self.value = self._initial

    def correct(self, running: Iterable[Leg]) -> None:
        """Raise the estimate after a retraction, from the legs that still run."""
        legs = list(running)
        decoded = sum(len(leg.emitted) for leg in legs)
        wanted = sum(leg.token_budget for leg in legs)
        self.value = min(1.0, (decoded + RETRACT_STEPS * len(legs)) / (wanted + 1))


class PrefillBudget:
    """Tokens that one step may still compute, and memory, in tokens, that may still be promised."""

    def __init__(
        self, pool: KvPool, running: Iterable[Leg], ratio: float, *, chunk_tokens: int, prefill_tokens: int
    ) -> None:
        self._pool = pool
        self.chunk_tokens = chunk_tokens
        self._prefill_tokens = prefill_tokens
        self._promised_tokens = sum(counted_tokens(leg) * expected_share(leg, ratio) for leg in running)

    @property
    def spent(self) -> bool:
        """Whether no more tokens can be computed in this step."""
        return self.chunk_tokens <= 0 or self._prefill_tokens <= 0

    def fits(self, leg: Leg, new_tokens: int) -> bool:
        """Whether there is unpromised memory for a leg's sequence and for the tokens it may emit."""
        needed = new_tokens + counted_tokens(leg) + self._pool.page_size_tokens
        return needed < self._pool.available_tokens - self._promised_tokens

    def chunk(self, leg: Leg, new_tokens: int) -> int:
        """Number of a leg's tokens that this step may compute: all of `new_tokens`, or those up to a full page."""
        if new_tokens <= self.chunk_tokens:
            return new_tokens
        page = self._pool.page_size_tokens
        return (leg.computed_tokens + self.chunk_tokens) // page * page - leg.computed_tokens

    def promise(self, leg: Leg, new_tokens: int, *, whole: bool) -> None:
        """Promise memory to a leg; with `whole` false (a chunk that is not the last), only for this chunk."""
        rounded = self._pool.tokens_for(new_tokens)
        self._promised_tokens += rounded + self._pool.page_size_tokens + (counted_tokens(leg) if whole else 0)
        self.chunk_tokens -= rounded
        self._prefill_tokens -= rounded


def counted_tokens(leg: Leg) -> int:
    """Tokens that a leg may still emit, at most COUNTED_NEW_TOKENS_MAX."""
    return min(leg.left_tokens, COUNTED_NEW_TOKENS_MAX)


def expected_share(leg: Leg, ratio: float) -> float:
    """Share of `counted_tokens` that a leg is expected to emit: all of them if it ignores the end of sequence."""
    return 1.0 if leg.request.stopping.ignore_eos else ratio
