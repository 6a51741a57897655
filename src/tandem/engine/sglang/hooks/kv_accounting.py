"""What really happened to a request's KV, noted in the scheduler process while it happens.

Fed by `hooks`, which sit where SGLang hands pages to NIXL and where it hears that they have arrived. Nothing in here is
computed from a model's shape: bytes are those NIXL's own telemetry reports for each finished write, and prompt tokens
count as recomputed when a batch that contains them is handed to the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.managers import load_snapshot


class AccountedSnapshot(load_snapshot.LoadSnapshot):  # type: ignore[misc]
    """SGLang's snapshot and three figures of ours; a scheduler that tells none leaves them None."""

    kv_transferring_tokens: int | None = None
    kv_cached_tokens: int | None = None
    kv_free_tokens: int | None = None


def read_accounts() -> None:
    """In the worker's process: read snapshots with our figures. Everybody else finds SGLang's own in them."""
    load_snapshot.snapshot_decoder = msgspec.msgpack.Decoder(AccountedSnapshot)


def account(snapshot: Any, inquirer: Any) -> AccountedSnapshot:
    """In the scheduler: the snapshot it is about to publish, with our figures."""
    stats = inquirer.pool_stats_observer.get_pool_stats()
    figures: dict[str, int] = {}
    # Of a pool in several parts SGLang tells the fuller part only, and nothing adds up to the capacity.
    if not stats.is_hybrid_swa:
        figures = {"kv_cached_tokens": stats.full_evictable_size, "kv_free_tokens": stats.full_available_size}
    # On prefill, hand-overs share the pages of a prefix with each other and with the cache: nobody counts those apart.
    if inquirer.disaggregation_mode.value == "decode":
        queue = inquirer.get_disagg_decode_transfer_queue()
        page = inquirer.token_to_kv_pool_allocator.page_size
        figures["kv_transferring_tokens"] = held_tokens(queue, page)
    return AccountedSnapshot(**msgspec.structs.asdict(snapshot), **figures)


def held_tokens(queue: Any, page_size_tokens: int) -> int:
    """Tokens' worth of pages that wait for KV, or whose request is over while prefill may still write into them."""
    given_up = (entry[0] for entry in queue._deferred_releases)
    return sum(
        -(-request.seqlen // page_size_tokens) * page_size_tokens
        for request in (*_on_device(queue.queue), *_on_device(given_up))
    )


def _on_device(requests: Iterable[Any]) -> Iterable[Any]:
    return (request for request in requests if not request.host_staged)


REMEMBERED_MAX = 16_384
"""Requests that were aborted are never asked about, so the oldest entries are forgotten."""


@dataclass(slots=True)
class Transfer:
    """The hand-over of one room, as this engine saw it. Times are seconds since the Unix epoch."""

    start_s: float | None = None
    """Prefill's alone: decode makes its pages known before there is anything to write, and hears of the end only."""
    end_s: float | None = None
    moved_bytes: int | None = None


class Ledger:
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
