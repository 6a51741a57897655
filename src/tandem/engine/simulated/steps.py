"""What the engine computes in one go: chunks of prompts, one more token for each leg of a batch, or both.

Values only; the scheduler makes them, the timing model says how long they take.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.engine.simulated.leg import Leg


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of one leg's sequence that is computed in this step."""

    leg: Leg
    start_tokens: int
    new_tokens: int
    first: bool
    """The leg was admitted with it."""

    @property
    def end_tokens(self) -> int:
        """Tokens whose KV exists afterwards."""
        return self.start_tokens + self.new_tokens

    @property
    def last(self) -> bool:
        """A token follows from it."""
        return self.end_tokens == self.leg.sequence_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Leg, ...] = ()


@dataclass(slots=True)
class Ended:
    """Legs that a step or a plan brought to their end, and how each ended."""

    naturally: list[Leg] = field(default_factory=list)
    """After their last token; a prefill leg after its hand-over."""
    out_of_memory: list[Leg] = field(default_factory=list)
    """Alone in the batch, and still without the pages for one more token."""
