"""Keys that expire unless they are renewed, for tables in which most keys are renewed long before.

Pure: times are passed in, in seconds. A renewal is one dictionary write; due keys are found by a heap, without a scan.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Expiries(Generic[K]):
    """Expiry times by key."""

    def __init__(self) -> None:
        self._until_s: dict[K, float] = {}
        self._check_s: dict[K, float] = {}
        """When each key is checked next: never after its expiry, perhaps before it, because renewals do not touch the
        heap.
        """
        self._heap: list[tuple[float, int, K]] = []
        """The entries of `_check_s` ordered by time, and outdated ones, which are skipped."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._until_s)

    def set(self, key: K, until_s: float) -> None:
        """Set the expiry of a new or renewed key."""
        self._until_s[key] = until_s
        if key not in self._check_s or until_s < self._check_s[key]:
            self._push(key, until_s)

    def discard(self, key: K) -> None:
        """Remove a key; does nothing where there is none."""
        self._until_s.pop(key, None)
        self._check_s.pop(key, None)

    def is_live(self, key: K, now_s: float) -> bool:
        """Whether a key exists and has not expired."""
        return self._until_s.get(key, now_s) > now_s

    def next_s(self) -> float | None:
        """When to call `take` next: not after the first expiry, perhaps before it. None: there are no keys."""
        while self._heap and self._is_void(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now_s: float) -> list[K]:
        """Remove and return the keys that have expired."""
        expired = []
        while self._heap and self._heap[0][0] <= now_s:
            entry = heapq.heappop(self._heap)
            key = entry[-1]
            if self._is_void(entry):
                continue
            if self._until_s[key] > now_s:
                self._push(key, self._until_s[key])
            else:
                self.discard(key)
                expired.append(key)
        return expired

    def _push(self, key: K, look_s: float) -> None:
        self._check_s[key] = look_s
        heapq.heappush(self._heap, (look_s, next(self._numbers), key))

    def _is_void(self, entry: tuple[float, int, K]) -> bool:
        look_s, _, key = entry
        return self._check_s.get(key) != look_s
