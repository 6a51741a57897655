"""The prompts of one accounted engine: first come, first served, in chunks, through a prefix cache.

Owns the order and the cache, which is the simulated engine's own pool; takes no time, `engine` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.timing import pairs_of, prompts_s
from tandem_frontend.replay.job import Job


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A part of a prompt that is computed in one step."""

    job: Job
    start_tokens: int
    new_tokens: int


class PromptQueue:
    """Prompts that wait or are partly computed."""

    def __init__(self, options: Options, pool: KvPool, *, holds_answers: bool) -> None:
        """`holds_answers`: whether a prompt's answer is generated in the same memory."""
        self._options = options
        self.pool = pool
        self._holds_answers = holds_answers
        self.waiting: deque[Job] = deque()
        self._current: Job | None = None
        """The one prompt that is partly computed."""
        self._is_full = False
        """The next prompt did not fit; not tried again until memory is released."""
        self.computed_tokens = 0
        self.cached_tokens = 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens still to be computed of the prompts that wait, without those that are cached now, and of the one that
        is partly computed, as SGLang counts them.
        """
        current = 0 if self._current is None else self._current.left_tokens
        return current + sum(job.prompt_tokens - self._cached(job, ()) for job in self.waiting)

    def submit(self, job: Job) -> None:
        """Add a prompt at the end."""
        self.waiting.append(job)

    def plan(self, now_s: float) -> list[PromptChunk]:
        """Choose the next step's chunks; empty: there is nothing to compute, or no memory for it."""
        budget = self._options.chunked_prefill_tokens
        chunks: list[PromptChunk] = []
        while budget > 0:
            job = self._current or self._admitted(now_s)
            if job is None:
                break
            new_tokens = min(budget, job.left_tokens)
            chunks.append(PromptChunk(job, job.computed_tokens, new_tokens))
            budget -= new_tokens
            self._current = None if new_tokens == job.left_tokens else job
            if self._current is not None:
                break
        return chunks

    def commit(self, chunks: Iterable[PromptChunk]) -> list[Job]:
        """Apply a computed step. Returns the prompts that are complete."""
        complete: list[Job] = []
        for chunk in chunks:
            job = chunk.job
            assert job.lease is not None, "a prompt is computed in pages that it holds"
            job.computed_tokens += chunk.new_tokens
            self.computed_tokens += chunk.new_tokens
            self.pool.checkpoint(job.lease, job.hashes[: job.computed_tokens // self.pool.page_size_tokens], ())
            if not job.left_tokens:
                complete.append(job)
        return complete

    def release(self, job: Job) -> None:
        """Release a prompt's memory; its full blocks stay cached."""
        assert job.lease is not None, "a prompt is released once"
        self.pool.close(job.lease)
        job.lease = None
        self._is_full = False

    def step_s(self, chunks: Sequence[PromptChunk]) -> float:
        """Time of a step."""
        tokens = sum(chunk.new_tokens for chunk in chunks)
        return prompts_s(self._options, tokens, sum(pairs_of(chunk.start_tokens, chunk.new_tokens) for chunk in chunks))

    def backlog_s(self, hashes: Sequence[int], prompt_tokens: int) -> float:
        """Exact time until a prompt that came now would be computed, without the step in progress. For the oracle.

        Prompts that wait count with what will be cached when their turn comes: the blocks of those before them too.
        """
        own = Job(prompt_tokens, 0, tuple(hashes))
        coming: set[int] = set(self._current.hashes) if self._current else set()
        seconds = 0.0 if self._current is None else whole_s(self._options, self._current.computed_tokens, self._current)
        for job in (*self.waiting, own):
            seconds += whole_s(self._options, self._cached(job, coming), job)
            coming.update(job.hashes)
        return seconds

    def _cached(self, job: Job, coming: Collection[int]) -> int:
        shareable = job.hashes[: (job.prompt_tokens - 1) // self.pool.page_size_tokens]
        count = self.pool.cached_pages(shareable)
        while count < len(shareable) and shareable[count] in coming:
            count += 1
        return count * self.pool.page_size_tokens

    def _admitted(self, now_s: float) -> Job | None:
        """The next prompt, with memory for all of it; None: there is none, or too little memory."""
        if self._is_full or not self.waiting:
            return None
        job = self.waiting[0]
        # The last token is always computed: its output is the first token of the answer.
        lease = self.pool.open(job.hashes[: (job.prompt_tokens - 1) // self.pool.page_size_tokens])
        if not self.pool.grow(lease, job.prompt_tokens + (job.answer_tokens if self._holds_answers else 0)):
            self.pool.close(lease)
            self._is_full = True
            return None
        self.waiting.popleft()
        job.lease, job.cached_tokens, job.computed_tokens = lease, lease.cached_tokens, lease.cached_tokens
        job.prefill_start_s = now_s
        self.cached_tokens += lease.cached_tokens
        return job


def whole_s(options: Options, start_tokens: int, job: Job) -> float:
    """Time to compute a prompt alone from `start_tokens` on, chunk by chunk."""
    seconds, at = 0.0, start_tokens
    while at < job.prompt_tokens:
        new_tokens = min(options.chunked_prefill_tokens, job.prompt_tokens - at)
        seconds += prompts_s(options, new_tokens, pairs_of(at, new_tokens))
        at += new_tokens
    return seconds
