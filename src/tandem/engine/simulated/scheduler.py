"""Chooses each step: SGLang's continuous batching, one decision between two forward passes.

Prompts first, chunk by chunk; otherwise one more token for every running leg; legs that no longer fit are retracted and
resumed later. Owns the queues and allocates pages from the pool. Never waits and has no clock; `machine` does that.
"""

from __future__ import annotations

from collections import deque

from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.budget import NewTokenRatio, PrefillBudget
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.preallocation import Preallocation
from tandem.engine.simulated.timing import Chunk, Ended, Step


class Scheduler:
    """The queues of one engine. Everything but `submit`, `ask_pages` and `leave` is called between two steps."""

    def __init__(self, role: WorkerRole, pool: KvPool, options: Options, running_requests_max: int) -> None:
        self._role = role
        self._pool = pool
        self._options = options
        self._running_requests_max = running_requests_max
        self._ratio = NewTokenRatio(options.new_token_ratio)
        self._full = False
        """An admission failed for lack of memory or slots; not retried until a running leg has left."""
        self.waiting: deque[Leg] = deque()
        self.running: list[Leg] = []
        self.chunked: Leg | None = None
        """The one leg whose prompt is partly computed."""
        self.computing: list[Leg] = []
        """Legs with a chunk in the current step."""
        self.transferring: list[Leg] = []
        self._leaving: list[Leg] = []
        self.preallocation = Preallocation(pool, options.reserved_decode_tokens, running_requests_max)

    @property
    def legs(self) -> set[Leg]:
        """Every leg in any queue."""
        queues = (self.waiting, self.computing, self.running, self.transferring, self.preallocation.legs)
        return {leg for queue in queues for leg in queue} | ({self.chunked} if self.chunked else set())

    def submit(self, leg: Leg) -> None:
        """Queue a leg whose prompt is to be computed."""
        leg.phase = Phase.WAITING
        self.waiting.append(leg)

    def ask_pages(self, leg: Leg) -> None:
        """Queue a decode leg that needs memory for its prompt."""
        leg.phase = Phase.PREALLOCATING
        self.preallocation.queue.append(leg)

    def leave(self, leg: Leg) -> None:
        """Remove a leg that is over, once the current step has ended."""
        self._leaving.append(leg)

    def take_leaving(self) -> list[Leg]:
        """Return the legs that are over and must be reaped now, and clear the list."""
        leaving, self._leaving = self._leaving, []
        return [leg for leg in leaving if leg.phase is not Phase.GONE]

    def reap(self, leg: Leg) -> None:
        """Release what a finished leg holds; a leg in the decode batch is released after one more step."""
        leg.reaped = True
        if leg.phase in (Phase.RUNNING, Phase.GONE):
            return
        if leg is self.chunked:
            self.chunked = None
        for queue in (self.waiting, self.transferring, self.preallocation.queue, self.preallocation.retracted):
            if leg in queue:
                queue.remove(leg)
        self._release(leg)

    def plan(self, ended: Ended) -> Step | None:
        """Choose the next step and allocate its pages; None if there is nothing to compute."""
        for leg in [leg for leg in self.transferring if leg.kv_went]:
            self.transferring.remove(leg)
            self._release(leg)
            ended.naturally.append(leg)
        if self._role is WorkerRole.DECODE:
            self._admit_decode_legs(ended)
            return Step(decodes=self._plan_decodes(ended)) if self.running else None
        if not self.running:
            self._full = False
        chunks = self._plan_chunks()
        if chunks:
            self.computing = [chunk.leg for chunk in chunks]
            mixed = self._options.mixed_chunk and self._fits_decodes(self.running)
            return Step(tuple(chunks), self._take_decode_pages() if mixed else ())
        decodes = self._plan_decodes(ended) if self.running else ()
        return Step(decodes=decodes) if decodes else None

    def commit(self, step: Step, ended: Ended) -> None:
        """Apply a computed step: output tokens, and move legs to their next phase."""
        for leg in step.decodes:
            leg.computed_tokens += 1
            leg.emit_next()
            if leg.reaped or leg.end() is not None:
                self._leave_batch(leg)
                ended.naturally.append(leg)
        self.computing = []
        for chunk in step.chunks:
            self._commit_chunk(chunk, ended)

    def rest(self) -> None:
        """Called when idle: resets the estimate and checks that no page is leaked."""
        self._ratio.reset()
        account = self._pool.account()
        assert self.legs or account.lent == account.transferring == 0, f"pages are held without a leg: {account}"

    # --- Prompts

    def _plan_chunks(self) -> list[Chunk]:
        if self.chunked is None and (self._full or not self.waiting):
            return []
        mixed = len(self.running) if self._options.mixed_chunk else 0
        budget = PrefillBudget(
            self._pool,
            self.running,
            self._ratio.value,
            chunk_tokens=self._options.chunked_prefill_tokens - mixed,
            prefill_tokens=self._options.prefill_tokens_max - mixed,
        )
        chosen: list[Chunk] = []
        if self.chunked is not None:
            leg = self.chunked
            taken = budget.chunk(leg, leg.sequence_tokens - leg.computed_tokens)
            if taken <= 0:
                return []
            chosen.append(Chunk(leg, leg.computed_tokens, taken, first=False))
            budget.promise(leg, taken, whole=chosen[0].last)
        self._admit(budget, chosen)
        return self._take_chunks(chosen)

    def _admit(self, budget: PrefillBudget, chosen: list[Chunk]) -> None:
        slots = self._running_requests_max - len(self.running) - len(self.transferring) - (self.chunked is not None)
        for leg in self.waiting:
            if budget.spent or (chosen and not chosen[-1].last):
                return
            if slots <= 0:
                self._full = True
                return
            chunk = self._admit_one(leg, budget, alone=not chosen and not self.running)
            if chunk is None:
                return
            chosen.append(chunk)
            slots -= 1

    def _admit_one(self, leg: Leg, budget: PrefillBudget, *, alone: bool) -> Chunk | None:
        # The last token is always computed, even if cached: its output is the next token.
        lease = self._pool.open(leg.names(leg.sequence_tokens - 1))
        leg.computed_tokens = lease.cached_tokens
        new_tokens = leg.sequence_tokens - lease.cached_tokens
        needed_pages = self._pool.pages_for(leg.sequence_tokens) - len(lease.shared)
        # A leg that is alone in the engine needs no promise: no other leg can compete for memory.
        fits = budget.fits(leg, new_tokens) or (alone and needed_pages <= self._pool.available_pages)
        taken = budget.chunk(leg, new_tokens) if fits else 0
        if taken <= 0:
            self._pool.close(lease)
            self._full = not fits and not alone
            return None
        leg.lease = lease
        chunk = Chunk(leg, lease.cached_tokens, taken, first=True)
        budget.promise(leg, taken, whole=chunk.last)
        return chunk

    def _take_chunks(self, chosen: list[Chunk]) -> list[Chunk]:
        """Allocate the pages of the chosen chunks, in order, until they run out; the other legs stay queued."""
        taken: list[Chunk] = []
        for index, chunk in enumerate(chosen):
            leg = chunk.leg
            assert leg.lease is not None
            if len(taken) < index or not self._pool.grow(leg.lease, chunk.end_tokens):
                if chunk.first:
                    self._pool.close(leg.lease)
                    leg.lease = None
                continue
            taken.append(chunk)
            if chunk.first:
                self.waiting.remove(leg)
                leg.phase = Phase.PREFILLING
                if not leg.emitted:
                    leg.cached_tokens = leg.lease.cached_tokens
            if not chunk.last:
                self.chunked = leg
            elif leg is self.chunked:
                self.chunked = None
        return taken

    def _commit_chunk(self, chunk: Chunk, ended: Ended) -> None:
        leg = chunk.leg
        assert leg.lease is not None
        leg.computed_tokens = chunk.end_tokens
        self._pool.checkpoint(leg.lease, leg.names(chunk.end_tokens), leg.sequence())
        leg.computed_parts.put_nowait(chunk.end_tokens)
        if not chunk.last:
            return
        leg.emit_next()
        if self._role is WorkerRole.PREFILL and leg.task is not None:
            leg.phase = Phase.TRANSFERRING
            self._pool.set_moving(leg.lease, True)
            self.transferring.append(leg)
        elif leg.end() is not None:
            self._release(leg)
            ended.naturally.append(leg)
        else:
            leg.phase = Phase.RUNNING
            self.running.append(leg)

    # --- Decode steps

    def _admit_decode_legs(self, ended: Ended) -> None:
        """Decode: allocate memory to queued legs, and move legs whose KV has arrived into the batch."""
        active = [*self.running, *self.waiting, *self.transferring]
        self.waiting += self.preallocation.resume(active)
        if not self.preallocation.retracted:
            self.transferring += self.preallocation.grant(self.running, [*self.waiting, *self.transferring])
        # Retracted legs have priority over new ones, unless only new ones can run and release memory.
        if not self.preallocation.retracted or not (self.running or self.waiting):
            for leg in [leg for leg in self.transferring if leg.kv_came]:
                assert leg.lease is not None
                self.transferring.remove(leg)
                self._pool.set_moving(leg.lease, False)
                leg.phase = Phase.WAITING
                leg.computed_tokens = leg.prompt_tokens
                self.waiting.append(leg)
        while self.waiting and len(self.running) < self._running_requests_max:
            self._enter_batch(self.waiting.popleft(), ended)

    def _enter_batch(self, leg: Leg, ended: Ended) -> None:
        """Add a leg to the decode batch; its first token was computed by the prefill leg."""
        if not leg.emitted:
            leg.emit_next()
            if leg.end() is not None:
                self._release(leg)
                ended.naturally.append(leg)
                return
        leg.phase = Phase.RUNNING
        self.running.append(leg)

    def _plan_decodes(self, ended: Ended) -> tuple[Leg, ...]:
        if self._fits_decodes(self.running):
            self._ratio.decay()
            return self._take_decode_pages()
        # As in SGLang, legs that have emitted the most tokens stay; of equals, those with the shortest prompts.
        kept = sorted(self.running, key=lambda leg: (len(leg.emitted), -leg.prompt_tokens), reverse=True)
        retracted: list[Leg] = []
        while len(kept) > 1 and (not retracted or not self._fits_decodes(kept)):
            retracted.append(kept.pop())
            self._retract(retracted[-1])
        if not self._fits_decodes(kept):
            ended.out_of_memory.append(kept[0])
            self._leave_batch(kept[0])
        self._ratio.correct(self.running)
        return self._take_decode_pages()

    def _fits_decodes(self, legs: list[Leg]) -> bool:
        new_pages = sum(leg.computed_tokens % self._pool.page_size_tokens == 0 for leg in legs)
        return new_pages <= self._pool.available_pages

    def _take_decode_pages(self) -> tuple[Leg, ...]:
        for leg in self.running:
            assert leg.lease is not None
            grown = self._pool.grow(leg.lease, leg.computed_tokens + 1)
            assert grown, "a decode step was planned without pages for it"
        return tuple(self.running)

    def _retract(self, leg: Leg) -> None:
        """Release a running leg's pages for other legs; its emitted tokens are kept."""
        assert leg.lease is not None
        self.running.remove(leg)
        self._full = False
        self._pool.close(leg.lease)
        leg.lease = None
        leg.retraction_count += 1
        if leg.over:
            leg.phase = Phase.GONE
        elif self._role is WorkerRole.DECODE:
            leg.phase = Phase.RETRACTED
            self.preallocation.retracted.append(leg)
        else:
            self.submit(leg)

    def _leave_batch(self, leg: Leg) -> None:
        self.running.remove(leg)
        self._full = False
        self._release(leg)

    def _release(self, leg: Leg) -> None:
        """Release a leg's pages; what it has computed stays in the prefix cache."""
        leg.phase = Phase.GONE
        if leg.lease is None:
            return
        lease, leg.lease = leg.lease, None
        self._pool.checkpoint(lease, leg.names(leg.computed_tokens), leg.sequence())
        self._pool.close(lease)
