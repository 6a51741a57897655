"""One leg inside the engine: its request, phase, emitted tokens and timestamps.

Owns the rules by which a generation ends (stop tokens, end of sequence, budget), and reports the end exactly once. The
scheduler decides when a leg computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from tandem.domain.generation import EngineFinish, EngineRequest, EngineTimings, FinishReason, KvCheck, TokenLogprob
from tandem.domain.kv_blocks import BlockHashes
from tandem.engine.port import Output
from tandem.engine.simulated.kv_pool import KvLease
from tandem.engine.simulated.tokens import SequenceState, Vocabulary, advance, digest, drawn
from tandem.errors import TandemError


class Phase(Enum):
    """Phase of a leg inside the engine."""

    BOOTSTRAP = "bootstrap"
    """Prefill: waits for its peer; not yet in the scheduler."""
    PREALLOCATING = "preallocating"
    """Decode: waits for memory for its prompt."""
    WAITING = "waiting"
    """Queued, to compute its prompt or, once its KV has arrived, to enter the batch."""
    PREFILLING = "prefilling"
    """Part of its prompt is computed or being computed."""
    RUNNING = "running"
    """In the decode batch."""
    TRANSFERRING = "transferring"
    """Its KV is being transferred to or from the other leg."""
    RETRACTED = "retracted"
    """Decode: gave up its pages for other legs; its KV is kept outside the pool."""
    GONE = "gone"
    """Holds no resources."""


@dataclass(slots=True, eq=False)
class Leg:
    """A request inside the engine."""

    request: EngineRequest
    vocabulary: Vocabulary
    token_budget: int
    """Maximum number of new tokens: the smallest of max_tokens, the rest of the context, and the rest of KV memory."""
    page_names: BlockHashes
    output: Output
    """Receives its tokens and its end."""
    eos_after_tokens: int | None = None
    draw_seed: int | None = None
    """None: greedy."""
    phase: Phase = Phase.BOOTSTRAP
    lease: KvLease | None = None
    computed_tokens: int = 0
    """Tokens of its sequence whose KV exists."""
    state: SequenceState | None = None
    """Hash state that determines the next token; None until the prompt has been computed or received."""
    over: bool = False
    """Its end has been reported and no output may follow; the scheduler releases its resources later."""
    reaped: bool = False
    """The scheduler has removed it; only a leg in the decode batch still holds resources then."""
    kv_came: bool = False
    """Decode: the KV transfer is complete."""
    kv_went: bool = False
    """Prefill: the KV transfer is complete."""
    pages_granted: asyncio.Event = field(default_factory=asyncio.Event)
    computed_parts: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    """Prefill: `computed_tokens` after each chunk, for the task that sends the KV."""
    task: asyncio.Task[None] | None = None
    """Task that connects to the other leg and transfers the KV."""
    emitted: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    recomputed_tokens: int | None = None
    kv_check: KvCheck | None = None
    retraction_count: int = 0
    time_s: Callable[[], float] | None = None
    """The engine's clock; None: timestamps are not recorded."""
    queued_time_s: float | None = None
    bootstrap_end_time_s: float | None = None
    preallocation_end_time_s: float | None = None
    prefill_start_time_s: float | None = None
    prefill_end_time_s: float | None = None
    kv_transfer_start_time_s: float | None = None
    kv_transfer_end_time_s: float | None = None
    first_token_time_s: float | None = None
    kv_transfer_bytes: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.token_ids)

    @property
    def sequence_tokens(self) -> int:
        """Length of the prompt plus the emitted tokens."""
        return self.prompt_tokens + len(self.emitted)

    @property
    def left_tokens(self) -> int:
        """Number of tokens it may still emit."""
        return self.token_budget - len(self.emitted)

    def sequence(self) -> list[int]:
        """The prompt followed by the emitted tokens."""
        return [*self.request.token_ids, *self.emitted]

    def names(self, tokens: int | None = None) -> list[int]:
        """Names of the full pages of the first `tokens` tokens (None: of all)."""
        return self.page_names.of(self.sequence()[:tokens])

    def emit_next(self) -> None:
        """Choose and output the next token."""
        if self.state is None:
            self.state = digest(self.request.token_ids, self.request.adapter)
        chooser = self.state if self.draw_seed is None else drawn(self.state, self.draw_seed)
        token_id = self._choose(chooser)
        self.emitted.append(token_id)
        if self.first_token_time_s is None and self.time_s is not None:
            self.first_token_time_s = self.time_s()
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.request.top_logprobs is not None:
            logprobs = (self.vocabulary.logprob(chooser, token_id, self.request.top_logprobs),)
        if not self.over:
            self.output.tokens((token_id,), logprobs)
        self.state = advance(self.state, token_id)

    def end(self) -> EngineFinish | None:
        """The finish, if the token just emitted was the last one, else None."""
        token_id = self.emitted[-1]
        if self._ends_generation(token_id):
            return self.finish(FinishReason.STOP, token_id)
        if len(self.emitted) >= self.token_budget:
            return self.finish(FinishReason.LENGTH)
        return None

    def ended(self) -> EngineFinish:
        """The finish of a leg that has emitted its last token."""
        finish = self.end()
        assert finish is not None, "finish of a leg that has tokens left"
        return finish

    def report_end(self, ending: EngineFinish | TandemError) -> None:
        """Output the end; no tokens may be emitted afterwards."""
        assert not self.over, "the end of a leg was reported twice"
        self.over = True
        if isinstance(ending, EngineFinish):
            self.output.finish(ending)
        else:
            self.output.fail(ending)

    def finish(self, reason: FinishReason, matched_token_id: int | None = None) -> EngineFinish:
        """A finish with the leg's current counts and timestamps."""
        request = self.request
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.prompt_logprobs and reason is not FinishReason.ABORTED:
            logprobs = self.vocabulary.prompt_logprobs(request.token_ids, request.top_logprobs or 0)
        return EngineFinish(
            reason=reason,
            matched_token_id=matched_token_id,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.emitted),
            cached_tokens=self.cached_tokens,
            recomputed_tokens=self.recomputed_tokens,
            kv_check=self.kv_check,
            timings=EngineTimings(
                queued_time_s=self.queued_time_s,
                bootstrap_end_time_s=self.bootstrap_end_time_s,
                preallocation_end_time_s=self.preallocation_end_time_s,
                prefill_start_time_s=self.prefill_start_time_s,
                prefill_end_time_s=self.prefill_end_time_s,
                kv_transfer_start_time_s=self.kv_transfer_start_time_s,
                kv_transfer_end_time_s=self.kv_transfer_end_time_s,
                first_token_time_s=self.first_token_time_s,
                kv_transfer_bytes=self.kv_transfer_bytes,
            ),
            prompt_logprobs=logprobs,
        )

    def _choose(self, state: SequenceState) -> int:
        position = len(self.emitted) + 1
        too_early = position <= (self.request.stopping.min_tokens or 0)
        eos = self.vocabulary.eos_token_id
        if eos is not None and position == self.eos_after_tokens and not too_early:
            return eos
        return self.vocabulary.next_token(state, refuse=self._ends_generation if too_early else None)

    def _ends_generation(self, token_id: int) -> bool:
        stopping = self.request.stopping
        if token_id in stopping.stop_token_ids:
            return True
        return token_id == self.vocabulary.eos_token_id and not stopping.ignore_eos
