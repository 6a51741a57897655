"""One request inside the accounted engines: its lengths, the KV that it holds, and when each part of it happened.

Owns no decision. Times are the virtual loop's, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.engine.simulated.kv_pool import KvLease


def _ignore(job: Job) -> None:
    """Nothing follows."""


@dataclass(slots=True, eq=False)
class Job:
    """A request from the moment in which it is sent to workers."""

    prompt_tokens: int
    answer_tokens: int
    hashes: tuple[int, ...]
    """Of the prefixes that its prompt's full blocks end."""
    prefilled: Callable[[Job], None] = _ignore
    """Called when the prompt is computed and its KV has reached the worker that streams."""
    ended: Callable[[Job], None] = _ignore
    """Called with the last token."""
    expected_tokens: int = 0
    """Prompt tokens that the frontend expects to be computed."""
    lease: KvLease | None = None
    """At the engine that computes the prompt."""
    computed_tokens: int = 0
    """Tokens of the prompt whose KV exists."""
    cached_tokens: int = 0
    """The part of them that was in the prefix cache."""
    sent_s: float = 0.0
    """When it was sent to its workers."""
    submitted_s: float = 0.0
    """When the decode engine had memory for it, and its prompt began to wait."""
    prefill_start_s: float = 0.0
    prefill_end_s: float = 0.0
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def left_tokens(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return self.prompt_tokens - self.computed_tokens
