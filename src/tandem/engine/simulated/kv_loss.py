"""A mirror that loses some of its pool's events, as a socket between an engine and its worker may.

Owns the loss, its discovery and the repair, with the times of the real follower: the next event shows a gap, or a quiet
second does, and the contents of the pool itself repair it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from tandem.engine.kv_mirror import KvCacheMirror

QUIET_S = 1.0
"""Time without an event after which a loss is noticed."""
REPAIR_S = 0.1


class LossyMirror(KvCacheMirror):
    """See the module."""

    def __init__(
        self,
        block_size_tokens: int,
        loss: float,
        seed: int,
        sleep: Callable[[float], Awaitable[None]],
        contents: Callable[[], list[int]],
    ) -> None:
        """Lose a fraction `loss` of the events; `contents` are the pool's."""
        super().__init__(block_size_tokens)
        self._loss = loss
        self._random = random.Random(seed)  # noqa: S311 -- chooses losses, no secret
        self._sleep = sleep
        self._contents = contents
        self._missing = False
        """Whether a loss has not been noticed yet."""
        self._repairing: asyncio.Task[None] | None = None

    def stored(self, block_hashes: Sequence[int], parent: int | None, token_ids: Sequence[int]) -> None:
        """See `KvCacheMirror`."""
        if self._arrives():
            super().stored(block_hashes, parent, token_ids)

    def removed(self, block_hashes: Sequence[int]) -> None:
        """See `KvCacheMirror`."""
        if self._arrives():
            super().removed(block_hashes)

    def cleared(self) -> None:
        """See `KvCacheMirror`."""
        if self._arrives():
            super().cleared()

    def close(self) -> None:
        """End a repair under way."""
        if self._repairing is not None:
            self._repairing.cancel()

    def _arrives(self) -> bool:
        if self._random.random() < self._loss:
            self._missing = True
            if self._repairing is None:
                self._repairing = asyncio.create_task(self._repair(), name="simulated-kv-repair")
            return False
        if self._missing and self.is_known:
            self.lost()
        return True

    async def _repair(self) -> None:
        while self._missing:
            await self._sleep(REPAIR_S if not self.is_known else QUIET_S)
            if self.is_known:
                self.lost()
                await self._sleep(REPAIR_S)
            # Read in one go: what is lost from here on is a new loss.
            self._missing = False
            self.replace(self._contents())
        self._repairing = None
