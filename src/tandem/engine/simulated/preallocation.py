"""Memory allocation of a decode engine, before KV arrives: pages for new prompts, and for retracted legs that resume.

Owns the two queues of legs that hold no pages. Pages are granted only if a reserve stays free for the running legs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tandem.engine.simulated.budget import counted_tokens
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase

EXTRA_SLOTS_RUNNING_MAX = 32
RESERVED_SHARE = 8


class Preallocation:
    """The queues of decode legs that wait for memory."""

    def __init__(self, pool: KvPool, reserved_decode_tokens: int, running_requests_max: int) -> None:
        self._pool = pool
        # On a small pool the configured reserve would never be free, and no leg would ever be granted pages.
        self._reserved_tokens = min(reserved_decode_tokens, pool.capacity_tokens // RESERVED_SHARE)
        extra = 2 * running_requests_max if running_requests_max <= EXTRA_SLOTS_RUNNING_MAX else 0
        self._slots = running_requests_max + extra
        self.queue: deque[Leg] = deque()
        self.retracted: deque[Leg] = deque()

    @property
    def legs(self) -> list[Leg]:
        """Every leg in either queue."""
        return [*self.queue, *self.retracted]

    def resume(self, active: Sequence[Leg]) -> list[Leg]:
        """Allocate pages to retracted legs, in order, while the active legs' reserve stays free; returns those legs."""
        resumed: list[Leg] = []
        while self.retracted:
            leg = self.retracted[0]
            free_tokens = self._pool.available_tokens - self._reserved_tokens * (len(active) + len(resumed))
            needed_tokens = self._pool.tokens_for(leg.computed_tokens) + self._reserved_tokens
            alone = not active and not resumed
            if needed_tokens > free_tokens and not alone:
                break
            if not self._take(leg, leg.computed_tokens):
                break
            self.retracted.popleft()
            leg.phase = Phase.WAITING
            resumed.append(leg)
        return resumed

    def grant(self, running: Sequence[Leg], arriving: Sequence[Leg]) -> list[Leg]:
        """Allocate pages for queued prompts, in order, and wake the legs' tasks; returns those legs."""
        granted: list[Leg] = []
        retractable_tokens = sum(leg.sequence_tokens for leg in running)
        single_tokens = max((self._whole_tokens(leg) - retractable_tokens for leg in running), default=0)
        while self.queue:
            leg = self.queue[0]
            active_count = len(running) + len(arriving) + len(granted)
            if active_count >= self._slots:
                break
            held_back = max(self._reserved_tokens * active_count, single_tokens)
            prompt_tokens = self._pool.tokens_for(leg.prompt_tokens)
            needed = max(prompt_tokens + self._reserved_tokens, self._whole_tokens(leg) - retractable_tokens)
            if active_count and needed > self._pool.available_tokens - held_back:
                break
            if not self._take(leg, leg.prompt_tokens):
                break
            assert leg.lease is not None
            self._pool.set_moving(leg.lease, True)
            self.queue.popleft()
            leg.phase = Phase.TRANSFERRING
            leg.pages_granted.set()
            granted.append(leg)
        return granted

    def _take(self, leg: Leg, tokens: int) -> bool:
        # Without a prefix cache, none of the names is known.
        lease = self._pool.open(leg.names(tokens))
        if not self._pool.grow(lease, tokens):
            self._pool.close(lease)
            return False
        leg.lease = lease
        if not leg.emitted:
            leg.cached_tokens = lease.cached_tokens
        return True

    @staticmethod
    def _whole_tokens(leg: Leg) -> int:
        return leg.prompt_tokens + counted_tokens(leg)
