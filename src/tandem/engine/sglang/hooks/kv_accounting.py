"""What really happened to a request's KV, noted in the scheduler process while it happens.

Fed by `hooks`, which sit where SGLang hands pages to NIXL and where it hears that they have arrived. Nothing in here is
computed from a model's shape: bytes are those NIXL's own telemetry reports for each finished write, and prompt tokens
count as recomputed when a batch that contains them is handed to the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

REMEMBERED_MAX = 16_384
"""Requests that were aborted are never asked about, so the oldest entries are forgotten."""


@dataclass(slots=True)
class Transfer:
    """The hand-over of one room, as this engine saw it. Times are seconds since the Unix epoch."""

    start_s: float | None = None
    """Prefill's alone: decode makes its pages known before there is anything to write, and hears of the end only."""
    end_s: float | None = None
    moved_bytes: int | None = None


class TransferStats:
    """Written by NIXL's worker threads and the scheduler's thread, read by the latter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: OrderedDict[int, Transfer] = OrderedDict()
        self._recomputed: OrderedDict[str, int] = OrderedDict()

    def began(self, room: int, now_s: float) -> None:
        """Prefill: the first page is about to be written."""
        with self._lock:
            transfer = self._transfer(room)
            transfer.start_s = transfer.start_s or now_s

    def moved(self, room: int, size_bytes: int, now_s: float) -> None:
        """So many bytes more have arrived in the other engine's memory (prefill), or in this one's (decode)."""
        with self._lock:
            transfer = self._transfer(room)
            transfer.moved_bytes = (transfer.moved_bytes or 0) + size_bytes
            transfer.end_s = now_s

    def moved_bytes(self, room: int) -> int | None:
        """Bytes so far; None when nothing was counted."""
        with self._lock:
            transfer = self._transfers.get(room)
            return None if transfer is None else transfer.moved_bytes

    def recomputed(self, rid: str, token_count: int) -> None:
        """So many prompt tokens of a request go through this engine's own model."""
        with self._lock:
            self._recomputed[rid] = self._recomputed.get(rid, 0) + token_count
            _forget(self._recomputed)

    def close(self, room: int | None, rid: str) -> tuple[Transfer, int]:
        """The hand-over and the recomputed tokens of a request that has ended; both are forgotten."""
        with self._lock:
            transfer = Transfer() if room is None else self._transfers.pop(room, Transfer())
            return transfer, self._recomputed.pop(rid, 0)

    def _transfer(self, room: int) -> Transfer:
        transfer = self._transfers.setdefault(room, Transfer())
        _forget(self._transfers)
        return transfer


def _forget(entries: OrderedDict[int, Transfer] | OrderedDict[str, int]) -> None:
    while len(entries) > REMEMBERED_MAX:
        entries.popitem(last=False)
