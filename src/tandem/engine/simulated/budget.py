"""Which prompts fit into the next step: SGLang's estimate of the memory that the legs admitted so far will still need.

Owns arithmetic only. The pool is asked and never changed; what is promised here is taken by the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg

COUNTED_NEW_TOKENS_MAX = 4096
"""Nobody's wish for more new tokens than this is counted."""
RATIO_MIN_SHARE = 0.14
RATIO_DECAY_STEPS = 600
RETRACT_STEPS = 20


class NewTokenRatio:
    """The share of their new tokens that legs are believed to emit: falls with each step, rises at retraction."""

    def __init__(self, initial: float) -> None:
        self._initial = initial
        self._lowest = initial * RATIO_MIN_SHARE
        self.value = initial

    def decay(self) -> None:
        """One more decode step went well."""
        self.value = max(self._lowest, self.value - (self._initial - self._lowest) / RATIO_DECAY_STEPS)

    def reset(self) -> None:
        """The engine is idle."""
        self.value = self._initial

    def correct(self, running: Iterable[Leg]) -> None:
        """The belief was too low: legs had to be retracted, and these are left."""
        legs = list(running)
        decoded = sum(len(leg.emitted) for leg in legs)
        wanted = sum(leg.token_budget for leg in legs)
        self.value = min(1.0, (decoded + RETRACT_STEPS * len(legs)) / (wanted + 1))


class PrefillBudget:
    """Tokens that one step may still compute, and tokens of memory that may still be promised."""

    def __init__(
        self, pool: KvPool, running: Iterable[Leg], ratio: float, *, chunk_tokens: int, prefill_tokens: int
    ) -> None:
        self._pool = pool
        self.chunk_tokens = chunk_tokens
        self._prefill_tokens = prefill_tokens
        self._promised_tokens = sum(counted_tokens(leg) * believed(leg, ratio) for leg in running)

    @property
    def spent(self) -> bool:
        """No more tokens can be computed in this step."""
        return self.chunk_tokens <= 0 or self._prefill_tokens <= 0

    def fits(self, leg: Leg, new_tokens: int) -> bool:
        """Whether the memory for a leg's sequence and for what it may emit can be promised besides the rest."""
        needed = new_tokens + counted_tokens(leg) + self._pool.page_size_tokens
        return needed < self._pool.available_tokens - self._promised_tokens

    def chunk(self, leg: Leg, new_tokens: int) -> int:
        """How many of a leg's tokens this step may compute: all that are left, or whole pages of them."""
        if new_tokens <= self.chunk_tokens:
            return new_tokens
        page = self._pool.page_size_tokens
        return (leg.computed_tokens + self.chunk_tokens) // page * page - leg.computed_tokens

    def promise(self, leg: Leg, new_tokens: int, *, whole: bool) -> None:
        """Count a leg in; of a prompt that is not computed to its end, only this part."""
        rounded = self._pool.tokens_for(new_tokens)
        self._promised_tokens += rounded + self._pool.page_size_tokens + (counted_tokens(leg) if whole else 0)
        self.chunk_tokens -= rounded
        self._prefill_tokens -= rounded


def counted_tokens(leg: Leg) -> int:
    """Tokens that a leg may still emit, as far as they are counted."""
    return min(leg.left_tokens, COUNTED_NEW_TOKENS_MAX)


def believed(leg: Leg, ratio: float) -> float:
    """The share of them that it is believed to emit; who ignores the end of sequence emits them all."""
    return 1.0 if leg.request.stopping.ignore_eos else ratio
