"""Where the pages of SGLang's KV pool are, told with its own load figures: cached, free, and held for a hand-over.

SGLang's snapshot tells how many tokens' worth of pages are used, and neither what is left nor who uses them. The
scheduler's side adds what its queues know; the worker's side reads it. Imported where SGLang runs only: it imports it.
"""

from __future__ import annotations

from collections.abc import Iterable
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
