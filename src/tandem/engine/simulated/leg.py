"""One leg while it runs: what it was asked, what it has emitted, and when which part of it happened.

Owns the rules by which a generation ends (stop tokens, end of sequence, budget). Waiting is the adapter's business.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from tandem.engine.simulated.tokens import SequenceState, Vocabulary, advance, drawn
from tandem.model.generation import (
    EngineFinish,
    EngineRequest,
    EngineTimings,
    FinishReason,
    TokenBatch,
    TokenLogprob,
)


@dataclass(slots=True, eq=False)
class Leg:
    """A request inside the engine."""

    request: EngineRequest
    vocabulary: Vocabulary
    token_budget: int
    """New tokens at most: the smallest of max_tokens, what the context leaves, and what KV memory leaves."""
    eos_after_tokens: int | None
    draw_seed: int | None = None
    """None: greedy."""
    batches: asyncio.Queue[TokenBatch | BaseException] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[EngineFinish] | None = None
    emitted: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    recomputed_tokens: int | None = None
    transferring: bool = False
    admitted: bool = False
    queued_time_s: float | None = None
    prefill_start_time_s: float | None = None
    prefill_end_time_s: float | None = None
    kv_transfer_start_time_s: float | None = None
    kv_transfer_end_time_s: float | None = None
    kv_transfer_bytes: int | None = None

    def emit_next(self, state: SequenceState) -> SequenceState:
        """Put out the token that follows `state`; returns the state after it."""
        chooser = state if self.draw_seed is None else drawn(state, self.draw_seed)
        token_id = self._choose(chooser)
        self.emitted.append(token_id)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.request.top_logprobs is not None:
            logprobs = (self.vocabulary.logprob(chooser, token_id, self.request.top_logprobs),)
        self.batches.put_nowait(TokenBatch(token_ids=(token_id,), logprobs=logprobs))
        return advance(state, token_id)

    def end(self) -> EngineFinish | None:
        """The finish, if the token just emitted was the last one."""
        token_id = self.emitted[-1]
        if self._ends_generation(token_id):
            return self.finish(FinishReason.STOP, token_id)
        if len(self.emitted) >= self.token_budget:
            return self.finish(FinishReason.LENGTH)
        return None

    def ended(self) -> EngineFinish:
        """The finish of a leg that is known to be over."""
        finish = self.end()
        assert finish is not None, "a leg was ended before its last token"
        return finish

    def finish(self, reason: FinishReason, matched_token_id: int | None = None) -> EngineFinish:
        """The account of this leg as it stands."""
        return EngineFinish(
            reason=reason,
            matched_token_id=matched_token_id,
            prompt_tokens=len(self.request.token_ids),
            completion_tokens=len(self.emitted),
            cached_tokens=self.cached_tokens,
            recomputed_tokens=self.recomputed_tokens,
            timings=EngineTimings(
                queued_time_s=self.queued_time_s,
                prefill_start_time_s=self.prefill_start_time_s,
                prefill_end_time_s=self.prefill_end_time_s,
                kv_transfer_start_time_s=self.kv_transfer_start_time_s,
                kv_transfer_end_time_s=self.kv_transfer_end_time_s,
                kv_transfer_bytes=self.kv_transfer_bytes,
            ),
        )

    def sequence(self) -> list[int]:
        """Tokens whose KV exists: the prompt and all emitted tokens but the last, which was never run."""
        return [*self.request.token_ids, *self.emitted[:-1]]

    def _choose(self, state: SequenceState) -> int:
        place = len(self.emitted) + 1
        too_early = place <= (self.request.stopping.min_tokens or 0)
        eos = self.vocabulary.eos_token_id
        if eos is not None and place == self.eos_after_tokens and not too_early:
            return eos
        return self.vocabulary.next_token(state, refuse=self._ends_generation if too_early else None)

    def _ends_generation(self, token_id: int) -> bool:
        stopping = self.request.stopping
        if token_id in stopping.stop_token_ids:
            return True
        return token_id == self.vocabulary.eos_token_id and not stopping.ignore_eos
