"""Who may run now: first come, first served, as long as KV pages and running places last.

Owns the engine's waiting queue. A request that does not fit waits, and nobody overtakes it, so nobody starves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.simulated.kv_pool import KvLease, KvPool


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request in the queue."""

    prompt: Sequence[int]
    total_tokens: int
    salt: str | None
    granted: asyncio.Future[KvLease]


class Admission:
    """The gate in front of one KV pool."""

    def __init__(self, pool: KvPool, running_requests_max: int) -> None:
        self._pool = pool
        self._running_requests_max = running_requests_max
        self._queue: deque[_Ticket] = deque()
        self.running_requests = 0

    @property
    def waiting_requests(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens in the queue."""
        return sum(len(ticket.prompt) for ticket in self._queue)

    async def admit(self, prompt: Sequence[int], total_tokens: int, salt: str | None) -> KvLease:
        """Wait for a place and for pages. Cancelling gives up the place in the queue, or the pages just granted."""
        ticket = _Ticket(prompt, total_tokens, salt, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        self._grant()
        try:
            return await ticket.granted
        except asyncio.CancelledError:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._grant()
            elif not ticket.granted.cancelled():
                self.release(ticket.granted.result())
            raise

    def release(self, lease: KvLease, computed: Sequence[int] = ()) -> None:
        """End a request; full pages of what it computed stay in the prefix cache."""
        self._pool.release(lease, computed)
        self.running_requests -= 1
        self._grant()

    def _grant(self) -> None:
        while self._queue and self.running_requests < self._running_requests_max:
            ticket = self._queue[0]
            if ticket.granted.cancelled():
                # Its task was cancelled and has not run yet; it finds itself gone from the queue.
                self._queue.popleft()
                continue
            lease = self._pool.reserve(ticket.prompt, ticket.total_tokens, ticket.salt)
            if lease is None:
                return
            self._queue.popleft()
            self.running_requests += 1
            ticket.granted.set_result(lease)
