"""The prompts that this worker has accepted and not computed yet: what load reports say of them.

Owns the count; `legs` says when a prompt begins and ends. An engine's own load lacks the prompts that are on their way
to it and the part that it computes now, so frontends would know each other's prompts late and incompletely (ADR 21).
"""

from __future__ import annotations

import asyncio

from tandem.clock import Clock, monotonic
from tandem.domain.worker import UnfinishedPrompts


class PromptCount:
    """Unfinished prompts of one worker."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._count = 0
        self._tokens = 0
        self._since_s = 0.0
        self._version = 0
        self._changed: asyncio.Event | None = None
        """Set with the next change; None: no report waits for it."""

    @property
    def version(self) -> int:
        """Grows with each change."""
        return self._version

    def begin(self, tokens: int) -> None:
        """A prompt was accepted, with so many tokens to be computed."""
        if not self._count:
            self._since_s = self._clock()
        self._count += 1
        self._tokens += tokens
        self._notify()

    def end(self, tokens: int) -> None:
        """A prompt of so many tokens was computed, or was given up."""
        self._count -= 1
        self._tokens -= tokens
        # The engine takes the next one when one is done.
        self._since_s = self._clock()
        self._notify()

    def read(self) -> UnfinishedPrompts:
        """What is unfinished now."""
        in_hand_s = max(0.0, self._clock() - self._since_s) if self._count else 0.0
        return UnfinishedPrompts(self._count, self._tokens, in_hand_s)

    async def changed(self, version: int) -> None:
        """Return when the version is no longer `version`."""
        while self._version == version:
            if self._changed is None:
                self._changed = asyncio.Event()
            await self._changed.wait()

    def _notify(self) -> None:
        self._version += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None
