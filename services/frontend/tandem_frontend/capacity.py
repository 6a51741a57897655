"""How much the workers have room for: their own word of what they can hold, less what is there now.

Pure. Counts the workers that stream answers (decode and aggregated), because a request stays there longest and its KV
is whole there. What one of them says of its load is old by up to a second; what this frontend has there is known. So
what others have there is reckoned when the workers' word is new, and what this frontend has is counted beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tandem.model.worker import EngineLoad, Start, Worker, WorkerRole, WorkerState

QUEUED_FRACTION = 0.25
"""Requests an engine may have in its own queue, for each that it runs: it must never have to wait for the next."""
QUEUED_MIN = 2
ANSWER_TOKENS_MAX = 4096
"""Of an answer, so many count: SGLang's own bound (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION). What comes to be longer is
rare, and engines have means of their own for it (retraction)."""
FAIR_FRACTION = 0.05
"""So much more than there is room for, one at least, is taken by a frontend that has less there than all others: a
frontend fills its own places as they become free, and whoever came late would never have as many."""


class Capacity:
    """Room of the workers of one model."""

    def __init__(
        self,
        model: str,
        workers: Callable[[], tuple[Worker, ...]],
        load: Callable[[Start], EngineLoad | None],
    ) -> None:
        """`workers` tells the present view, `load` what a worker has last said of itself (None: nothing lately)."""
        self._model = model
        self._workers = workers
        self._load = load
        self._told = (0, 0)
        self._others = (0, 0)
        """Requests and tokens of other frontends, as of when the workers' word last changed."""

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        """What a request counts for: what it may hold at a time, as far as engines themselves set memory aside for it.

        An answer may be said to be as long as the whole context allows. As such it would wait for all others to end,
        and those behind it would wait for it.
        """
        tokens = prompt_tokens + min(answer_tokens, ANSWER_TOKENS_MAX)
        held = [
            min(worker.capabilities.context_tokens_max, worker.capabilities.kv_capacity_tokens)
            for worker in self._workers()
            if self._streams(worker)
        ]
        return min(tokens, max(held, default=tokens))

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether one more request has room. Without any worker it has: routing then says that there is none."""
        streaming = [worker for worker in self._workers() if self._streams(worker)]
        if not streaming:
            return True
        if held_requests == 0:
            # Whatever the others do and however long it is: one request at a time always goes on.
            return True
        told = self._sum(streaming)
        if told != self._told:
            self._told = told
            self._others = max(0, told[0] - held_requests), max(0, told[1] - held_tokens)
        others_requests, others_tokens = self._others
        requests_max = sum(map(_requests_max, streaming))
        if held_requests < others_requests:
            requests_max += max(1, int(requests_max * FAIR_FRACTION))
        tokens_max = sum(worker.capabilities.kv_capacity_tokens for worker in streaming)
        return held_requests + others_requests < requests_max and held_tokens + others_tokens + tokens <= tokens_max

    def _sum(self, streaming: Iterable[Worker]) -> tuple[int, int]:
        """Requests and tokens of all frontends, as the workers tell them."""
        requests = tokens = 0
        for worker in streaming:
            load = self._load(worker.start)
            if load is not None:
                # No more than it can have: one that counts wrongly must not close the door of all others.
                told = (load.running_requests or 0) + (load.waiting_requests or 0)
                requests += min(max(0, told), _requests_max(worker))
                tokens += min(max(0, load.kv_used_tokens or 0), worker.capabilities.kv_capacity_tokens)
        return requests, tokens

    def _streams(self, worker: Worker) -> bool:
        return (
            worker.role is not WorkerRole.PREFILL
            and worker.state is WorkerState.SERVING
            and worker.capabilities.model == self._model
        )


def _requests_max(worker: Worker) -> int:
    running = worker.capabilities.running_requests_max
    return running + max(QUEUED_MIN, int(running * QUEUED_FRACTION))
