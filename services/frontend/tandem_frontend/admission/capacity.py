"""How much the workers have room for: their own word of what they can hold, less what is there now.

Pure. Counts the workers that stream answers (decode and aggregated), because a request stays there longest and its KV
is whole there. What one of them says of its load is old by up to a second; what this frontend has there is known. So
what others have there is reckoned when the workers' word is new, and what this frontend has is counted beside it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import LEG_CONTRACT, EngineLoad, Start, Worker, WorkerRole, WorkerState

QUEUED_FRACTION = 0.25
"""Requests an engine may have in its own queue, for each that it runs: it must never have to wait for the next."""
QUEUED_MIN = 2
ANSWER_TOKENS_MAX = 4096
"""Of an answer, so many count: SGLang's own bound (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION). What comes to be longer is
rare, and engines have means of their own for it (retraction)."""
FAIR_FRACTION = 0.05
"""So much more than there is room for, one at least, is taken by a frontend that has less there than all others: a
frontend fills its own places as they become free, and whoever came late would never have as many."""


@dataclass(frozen=True, slots=True)
class _Headroom:
    """What one worker can take."""

    requests: int
    tokens: int
    request_tokens: int
    """Of one request."""

    def taken(self, load: EngineLoad | None) -> tuple[int, int]:
        """Requests and tokens that are there: no more than it can have, because one that counts wrongly must not close
        the door of all others. Without a load none are known.
        """
        if load is None:
            return 0, 0
        requests = (load.running_requests or 0) + (load.waiting_requests or 0)
        return min(max(0, requests), self.requests), min(max(0, load.kv_used_tokens or 0), self.tokens)


class Capacity:
    """Room of the workers of one model: sums that are kept up to date by what changes, so that a request only reads
    them.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._view = KnownView()
        self._rooms: dict[Start, _Headroom] = {}
        """Of the workers that stream answers."""
        self._loads: dict[Start, EngineLoad] = {}
        """Of all workers that have said one lately."""
        self._request_tokens: list[int] = []
        """Of all rooms, ascending."""
        self._requests_max = self._tokens_max = 0
        self._requests = self._tokens = 0
        """There now, of all frontends, as the workers say it."""
        self._said = (0, 0)
        self._others = (0, 0)
        """Requests and tokens of other frontends, as of when what the workers say last changed."""

    def follow(self, workers: Iterable[Worker]) -> None:
        """Take another view of the registry."""
        removed, added = self._view.replace(workers)
        for worker in removed:
            if worker.start in self._rooms:
                self._remove(worker.start)
        for worker in added:
            if self._streams(worker):
                self._add(worker)

    def note(self, start: Start, load: EngineLoad | None) -> None:
        """A worker has said how busy it is; None: it has not for too long, or is not asked any more."""
        before = self._loads.pop(start, None)
        if load is not None:
            self._loads[start] = load
        room = self._rooms.get(start)
        if room is not None:
            self._count(room, before, -1)
            self._count(room, load, 1)

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        """What a request counts for: what it may hold at a time, as far as engines themselves set memory aside for it.

        An answer may be said to be as long as the whole context allows. As such it would wait for all others to end,
        and those behind it would wait for it.
        """
        tokens = prompt_tokens + min(answer_tokens, ANSWER_TOKENS_MAX)
        return min(tokens, self._request_tokens[-1]) if self._request_tokens else tokens

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether one more request has room. Without any worker it has: routing then says that there is none."""
        if not self._rooms:
            return True
        if held_requests == 0:
            # Whatever the others do and however long it is: one request at a time always goes on.
            return True
        said = self._requests, self._tokens
        if said != self._said:
            self._said = said
            self._others = max(0, said[0] - held_requests), max(0, said[1] - held_tokens)
        others_requests, others_tokens = self._others
        requests_max = self._requests_max
        if held_requests < others_requests:
            requests_max += max(1, int(requests_max * FAIR_FRACTION))
        has_tokens = held_tokens + others_tokens + tokens <= self._tokens_max
        return held_requests + others_requests < requests_max and has_tokens

    def _add(self, worker: Worker) -> None:
        room = self._rooms[worker.start] = _room(worker)
        self._requests_max += room.requests
        self._tokens_max += room.tokens
        insort(self._request_tokens, room.request_tokens)
        self._count(room, self._loads.get(worker.start), 1)

    def _remove(self, start: Start) -> None:
        room = self._rooms.pop(start)
        self._requests_max -= room.requests
        self._tokens_max -= room.tokens
        del self._request_tokens[bisect_left(self._request_tokens, room.request_tokens)]
        self._count(room, self._loads.get(start), -1)

    def _count(self, room: _Headroom, load: EngineLoad | None, sign: int) -> None:
        requests, tokens = room.taken(load)
        self._requests += sign * requests
        self._tokens += sign * tokens

    def _streams(self, worker: Worker) -> bool:
        return (
            worker.role is not WorkerRole.PREFILL
            and worker.state is WorkerState.SERVING
            and worker.leg_contract == LEG_CONTRACT
            and worker.capabilities.model == self._model
        )


def _room(worker: Worker) -> _Headroom:
    capabilities = worker.capabilities
    running, tokens = capabilities.running_requests_max, capabilities.kv_capacity_tokens
    requests = running + max(QUEUED_MIN, int(running * QUEUED_FRACTION))
    return _Headroom(requests, tokens, min(capabilities.context_tokens_max, tokens))
