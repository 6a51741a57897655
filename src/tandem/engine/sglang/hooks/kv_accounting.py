"""KV transfer statistics per request, recorded in the scheduler process during the transfer.

Written by hooks (`hooks.scheduler_hooks`) at the points where SGLang submits pages to NIXL and where it learns that
they have arrived. Measured, never computed from the model's shape: bytes are those that NIXL's telemetry reports for
each finished write, and prompt tokens count as recomputed when a batch that contains them is passed to the model.
With tensor parallelism each rank records its own, and what the first one reports is taken times `kv_shards`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

REMEMBERED_MAX = 16_384
"""Entries of aborted requests are never closed, so the oldest are dropped beyond this count."""


@dataclass(slots=True)
class Transfer:
    """The KV transfer of one bootstrap room, as seen by this engine. Times are seconds since the Unix epoch."""

    start_s: float | None = None
    """Set on prefill only: decode is notified only of the end."""
    end_s: float | None = None
    moved_bytes: int | None = None

    def moved_bytes_of(self, shards: int) -> int | None:
        """Bytes that so many ranks have moved, of which this is one."""
        return None if self.moved_bytes is None else self.moved_bytes * shards


class TransferStats:
    """Written by NIXL's worker threads and the scheduler's thread, read by the latter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: OrderedDict[int, Transfer] = OrderedDict()
        self._recomputed: OrderedDict[str, int] = OrderedDict()

    def began(self, room: int, now_s: float) -> None:
        """Prefill: record that the first page is about to be written."""
        with self._lock:
            transfer = self._transfer(room)
            transfer.start_s = transfer.start_s or now_s

    def moved(self, room: int, size_bytes: int, now_s: float) -> None:
        """Add bytes that have arrived in the decode engine's memory (called on both sides)."""
        with self._lock:
            transfer = self._transfer(room)
            transfer.moved_bytes = (transfer.moved_bytes or 0) + size_bytes
            transfer.end_s = now_s

    def moved_bytes(self, room: int) -> int | None:
        """Bytes so far; None if nothing was recorded."""
        with self._lock:
            transfer = self._transfers.get(room)
            return None if transfer is None else transfer.moved_bytes

    def recomputed(self, rid: str, token_count: int) -> None:
        """Add prompt tokens of a request that this engine computes itself."""
        with self._lock:
            self._recomputed[rid] = self._recomputed.get(rid, 0) + token_count
            _forget(self._recomputed)

    def close(self, room: int | None, rid: str) -> tuple[Transfer, int]:
        """Remove and return the transfer and the recomputed tokens of a request that has ended."""
        with self._lock:
            transfer = Transfer() if room is None else self._transfers.pop(room, Transfer())
            return transfer, self._recomputed.pop(rid, 0)

    def _transfer(self, room: int) -> Transfer:
        transfer = self._transfers.setdefault(room, Transfer())
        _forget(self._transfers)
        return transfer


def kv_shards(heads: int, heads_of_a_rank: int) -> int:
    """How many ranks hold different KV heads. More ranks than heads hold copies of them, which count once."""
    return max(1, heads // heads_of_a_rank)


def _forget(entries: OrderedDict[int, Transfer] | OrderedDict[str, int]) -> None:
    while len(entries) > REMEMBERED_MAX:
        entries.popitem(last=False)
