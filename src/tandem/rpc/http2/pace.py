"""How fast one message comes or leaves, and the memory that unfinished messages share.

Owns the choice of what is evicted at a bound on memory: the message without progress for longest. A peer that
holds memory and sends or reads a byte now and then must not shut out those that go on.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from tandem.rpc.http2 import limits


class Pace:
    """Of one message, from its beginning."""

    __slots__ = ("_begun_s", "_bytes", "_piece_s")

    def __init__(self, now_s: float) -> None:
        self._begun_s = self._piece_s = now_s
        self._bytes = 0

    def count(self, size: int, now_s: float) -> bool:
        """So many bytes more. Returns whether they complete a piece that counts as progress."""
        self._bytes += size
        if self._bytes < limits.PROGRESS_BYTES:
            return False
        self._bytes = 0
        self._piece_s = now_s
        return True

    def is_slow(self, now_s: float) -> bool:
        """Whether it has made no progress for too long, or takes too long altogether."""
        return now_s - self._piece_s > limits.PROGRESS_TIMEOUT_S or now_s - self._begun_s > limits.MESSAGE_TIMEOUT_S


class HeldMessage(Protocol):
    """A message that bytes are kept of."""

    def evict(self) -> None:
        """End it: its bytes are needed by others."""


class MessageMemory:
    """Bytes that are kept of unfinished messages, and of which; those without progress for longest come first."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self.unread: Counter[str] = Counter()
        """By account, calls among them whose handlers have ended, and of whose responses much is unread."""
        self._kept: dict[HeldMessage, int] = {}

    def keep(self, message: HeldMessage, size: int) -> None:
        """So many bytes are kept of it now. One that is new comes last."""
        self.bytes += size - self._kept.get(message, 0)
        if size:
            self._kept[message] = size
        else:
            self._kept.pop(message, None)

    def count_unread(self, account: str, change: int) -> None:
        """So many more such calls of an account."""
        self.unread[account] += change
        if not self.unread[account]:
            del self.unread[account]

    def advance(self, message: HeldMessage) -> None:
        """It has made progress."""
        size = self._kept.pop(message, None)
        if size is not None:
            self._kept[message] = size

    def evict(self) -> None:
        """End messages until the others fit."""
        while self.bytes > self.bytes_max and self._kept:
            message = next(iter(self._kept))
            message.evict()
            self.keep(message, 0)
