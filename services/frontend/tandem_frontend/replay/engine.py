"""An accounted engine in virtual time: one step after the other, prompts first, as the simulated engine's scheduler.

Owns the engine's time: steps, the link that sends KV, and what its load report says. Requests are numbers here; no
token is generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tandem.domain.worker import EngineLoad, Worker, WorkerRole
from tandem.engine.simulated.kv_pool import KvPool, PageLog
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.timing import Timing
from tandem.worker.unfinished_prompts import PromptCount
from tandem_frontend.replay.decode_batch import DecodeBatch, DecodeMemory, Run
from tandem_frontend.replay.job import Job
from tandem_frontend.replay.prompt_queue import PromptChunk, PromptQueue


@dataclass(slots=True)
class Figures:
    """What an engine has done."""

    busy_s: float = 0.0
    prompts_s: float = 0.0
    """The part of it that prompts took."""
    prompts_count: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    transferred_bytes: int = 0
    waiting_peak: int = 0


class Link:
    """The sending link of one engine: transfers share it, part by part, in the order in which the parts are ready."""

    def __init__(self, timing: Timing, clock: Callable[[], float]) -> None:
        self._timing = timing
        self._clock = clock
        self._free_s = 0.0

    def send(self, size_bytes: int) -> float:
        """Send a part after those before it. Returns when it has arrived."""
        self._free_s = max(self._free_s, self._clock()) + self._timing.transfer_s(size_bytes)
        return self._free_s


class AccountedEngine:
    """One worker's engine."""

    def __init__(self, worker: Worker, options: Options, seed: int, log: PageLog | None = None) -> None:
        """Needs a running loop, on whose time it works. `log` follows its prefix cache."""
        self.on_change: Callable[[], None] = _nothing
        """Called when a prompt has come or is computed."""
        capabilities = worker.capabilities
        self.worker = worker
        self.has_left = False
        """Whether the worker has taken another role: then another engine is its next start."""
        self.figures = Figures()
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._timing = Timing(options, seed)
        caches = options.prefix_cache and worker.role is not WorkerRole.DECODE
        pool = KvPool(capabilities.kv_capacity_tokens, capabilities.page_size_tokens, prefix_cache=caches, mirror=log)
        is_aggregated = worker.role is WorkerRole.AGGREGATED
        self.prompts = PromptQueue(options, pool, holds_answers=is_aggregated)
        self.batch = DecodeBatch(options, capabilities.running_requests_max)
        self.memory = DecodeMemory(capabilities.kv_capacity_tokens)
        self._link = Link(self._timing, self._loop.time)
        self._arrivals: dict[Job, float] = {}
        """When the parts of a prompt that were sent so far have arrived."""
        self._peers: dict[Job, AccountedEngine] = {}
        self._unfinished = PromptCount(self._loop.time)
        """As a worker counts them."""
        self._step: list[PromptChunk] | None = None
        self._step_end_s = 0.0
        self._run: tuple[Run, float, asyncio.TimerHandle] | None = None
        """The decode steps in progress, when they began, and the timer of their end."""

    def begin(self, job: Job, decode: AccountedEngine | None) -> None:
        """Start a request here; `decode` reserves its memory first, as an engine must before KV can be sent to it."""
        job.sent_s = self._loop.time()
        self._unfinished.begin(job.expected_tokens)
        self.on_change()
        if decode is None:
            self._submit(job)
        else:
            self._peers[job] = decode
            decode.memory.ask(job, lambda: self._submit(job))

    def receive(self, job: Job) -> None:
        """All KV of a request has arrived: it generates from the next step on."""
        self.batch.waiting.append(job)
        self._wake()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is open here: no prompt, no transfer, no answer, and no request that waits for memory."""
        has_prompts = self._step is not None or self.prompts.waiting or self._peers or self._arrivals
        return not (
            has_prompts or len(self.batch) or self.batch.waiting or self.memory.used_tokens or self.memory.asking
        )

    def load(self) -> EngineLoad:
        """As a worker reports it."""
        pool, role = self.prompts.pool, self.worker.role
        account = pool.account()
        used = (account.lent + account.transferring) * pool.page_size_tokens
        return EngineLoad(
            running_requests=len(self.batch) + len({chunk.job for chunk in self._step or ()}),
            waiting_requests=len(self.prompts.waiting) + len(self.batch.waiting),
            waiting_tokens=self.prompts.waiting_tokens,
            kv_used_tokens=self.memory.used_tokens if role is WorkerRole.DECODE else used,
            kv_capacity_tokens=self.worker.capabilities.kv_capacity_tokens,
            transferring_requests=len(self._arrivals) + len(self.memory.asking),
            kv_cached_tokens=account.cached * pool.page_size_tokens,
            computed_tokens=self.figures.prompt_tokens - self.figures.cached_tokens,
            unfinished=None if role is WorkerRole.DECODE else self._unfinished.read(),
        )

    def backlog_s(self, hashes: tuple[int, ...], prompt_tokens: int) -> float:
        """Exact time until a prompt that came now would be computed. For the oracle, which knows everything."""
        step_left_s = max(0.0, self._step_end_s - self._loop.time()) if self._step is not None else 0.0
        return step_left_s + self.prompts.backlog_s(hashes, prompt_tokens)

    # --- Steps

    def _submit(self, job: Job) -> None:
        job.submitted_s = self._loop.time()
        self.prompts.submit(job)
        self.figures.waiting_peak = max(self.figures.waiting_peak, len(self.prompts.waiting))
        self._wake()

    def _wake(self) -> None:
        """Begin a step, unless one is in progress. A run of decode steps ends early, with the step in progress."""
        if self._run is not None:
            run, begin_s, timer = self._run
            steps = run.steps_begun(self._options, self._loop.time() - begin_s)
            if steps < run.steps and (self.batch.has_place or self.prompts.waiting):
                timer.cancel()
                end_s = begin_s + run.time_s(self._options, steps)
                self._run = run, begin_s, self._loop.call_at(end_s, self._end_run, steps)
        elif self._step is None:
            self._next()

    def _next(self) -> None:
        now_s = self._loop.time()
        self._end(self.batch.enter(now_s))
        chunks = self.prompts.plan(now_s)
        if chunks:
            duration_s = self._timing.jittered(self.prompts.step_s(chunks))
            self.figures.busy_s += duration_s
            self.figures.prompts_s += duration_s
            self._step, self._step_end_s = chunks, now_s + duration_s
            self._loop.call_at(self._step_end_s, self._end_step)
            return
        run = self.batch.plan(self._timing.jittered(1.0))
        if run is not None:
            timer = self._loop.call_at(now_s + run.time_s(self._options, run.steps), self._end_run, run.steps)
            self._run = run, now_s, timer

    def _end_step(self) -> None:
        chunks, self._step = self._step, None
        assert chunks is not None, "a step ends once"
        complete = self.prompts.commit(chunks)
        for chunk in chunks:
            if chunk.job in self._peers:
                self._send(chunk)
        for job in complete:
            self._complete(job)
        self._next()

    def _end_run(self, steps: int) -> None:
        assert self._run is not None, "a run ends once"
        run, begin_s, _ = self._run
        self._run = None
        self.figures.busy_s += run.time_s(self._options, steps)
        self._end(self.batch.commit(run, steps, begin_s))
        # Ended requests may have made others begin here.
        if self._step is None and self._run is None:
            self._next()

    def _complete(self, job: Job) -> None:
        """A prompt is computed: its KV moves to the decode engine, or it generates here."""
        job.prefill_end_s = self._loop.time()
        self.figures.prompts_count += 1
        self.figures.prompt_tokens += job.prompt_tokens
        self.figures.cached_tokens += job.cached_tokens
        if job in self._peers:
            self._loop.call_at(self._arrivals.pop(job), self._arrive, job)
            return
        self.batch.waiting.append(job)
        self._prefilled(job)

    def _send(self, chunk: PromptChunk) -> None:
        """Send what a step has added; with the first chunk also what was cached."""
        job = chunk.job
        tokens = chunk.new_tokens if job in self._arrivals else chunk.start_tokens + chunk.new_tokens
        size_bytes = tokens * self.worker.capabilities.kv_bytes_per_token
        self.figures.transferred_bytes += size_bytes
        self._arrivals[job] = self._link.send(size_bytes)

    def _arrive(self, job: Job) -> None:
        decode = self._peers.pop(job)
        self.prompts.release(job)
        self._prefilled(job)
        decode.receive(job)
        self._wake()

    def _prefilled(self, job: Job) -> None:
        """As for a worker, a prompt is unfinished until its first token."""
        self._unfinished.end(job.expected_tokens)
        self.on_change()
        job.prefilled(job)

    def _end(self, ended: Iterable[Job]) -> None:
        for job in ended:
            job.end_s = self._loop.time()
            if self.worker.role is WorkerRole.DECODE:
                self.memory.release(job)
            else:
                self.prompts.release(job)
            job.ended(job)


def _nothing() -> None:
    """No frontend follows."""
