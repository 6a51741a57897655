"""The timing model of the simulated engine, its steps, and its clock.

Time and randomness are passed in, so that a test can replace the clock and repeat the jitter.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from tandem.engine.simulated.leg import Leg


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a leg's sequence that is computed in one step."""

    leg: Leg
    start_tokens: int
    new_tokens: int
    first: bool
    """Whether it is the leg's first chunk."""

    @property
    def end_tokens(self) -> int:
        """Number of tokens whose KV exists afterwards."""
        return self.start_tokens + self.new_tokens

    @property
    def last(self) -> bool:
        """Whether it completes the sequence, so that the step outputs a token."""
        return self.end_tokens == self.leg.sequence_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Leg, ...] = ()


@dataclass(slots=True)
class Ended:
    """Legs that ended in a step or while it was planned."""

    naturally: list[Leg] = field(default_factory=list)
    """After their last token; a prefill leg after its KV transfer."""
    out_of_memory: list[Leg] = field(default_factory=list)
    """Alone in the batch, and still without a page for one more token."""


if TYPE_CHECKING:
    from tandem.engine.simulated.options import Options


class Clock(Protocol):
    """The engine's source of time."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Wait for `duration_s` seconds; may be cancelled."""
        ...


class SystemClock:
    """The system clock and the event loop's sleep."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        """Wait for `duration_s` seconds; may be cancelled."""
        await asyncio.sleep(duration_s)


def pairs_of(start_tokens: int, new_tokens: int) -> float:
    """Pairs of a token and an earlier one that `new_tokens` after the first `start_tokens` of a prompt compute."""
    return new_tokens * (start_tokens + new_tokens / 2)


def prompts_s(options: Options, tokens: int, pairs: float) -> float:
    """Time of a step over prompts: new tokens, and their pairs with earlier ones."""
    return options.prefill_step_s + tokens / options.prefill_tokens_per_s + pairs * options.prefill_pair_s


def decodes_s(options: Options, requests: float, context_tokens: float) -> float:
    """Time of a decode step; linear in both arguments."""
    request_s = requests * options.decode_request_s
    return options.decode_step_s + request_s + context_tokens * options.decode_context_token_s


class Timing:
    """Durations of forward passes and transfers, jittered by a seeded generator."""

    def __init__(self, options: Options, seed: int) -> None:
        self._options = options
        self._random = random.Random(seed)  # noqa: S311 -- repeatable jitter, no secret

    def step_s(self, step: Step) -> float:
        """Time of one forward pass."""
        return self.jittered(self.prefill_s(step) + self.decode_s(step))

    def prefill_s(self, step: Step) -> float:
        """Time of the prompts in a step, without jitter."""
        if not step.chunks:
            return 0.0
        tokens = sum(chunk.new_tokens for chunk in step.chunks)
        pairs = sum(pairs_of(chunk.start_tokens, chunk.new_tokens) for chunk in step.chunks)
        return prompts_s(self._options, tokens, pairs)

    def decode_s(self, step: Step) -> float:
        """Time of one more token for each running leg, without jitter."""
        if not step.decodes:
            return 0.0
        context_tokens = sum(leg.computed_tokens for leg in step.decodes)
        # In a mixed step the fixed time is already in `prefill_s`; running legs only add their own share.
        fixed_s = self._options.decode_step_s if step.chunks else 0.0
        return decodes_s(self._options, len(step.decodes), context_tokens) - fixed_s

    def transfer_s(self, size_bytes: int, *, begun: bool = False) -> float:
        """Time to transfer a part of the KV; with `begun`, the rest of a part whose latency is already counted."""
        latency_s = 0.0 if begun else self._options.transfer_latency_s
        return self.jittered(latency_s + size_bytes / self._options.transfer_bytes_per_s)

    def jittered(self, duration_s: float) -> float:
        """The duration, scaled by the next random factor."""
        return duration_s * (1 + self._options.jitter * self._random.uniform(-1, 1))
