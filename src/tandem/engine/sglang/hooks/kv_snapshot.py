"""Extends SGLang's load snapshot with the use of its KV pool: cached, free, and reserved for a KV transfer.

SGLang's snapshot has the number of used tokens, but neither what is left nor what uses them. The scheduler's side adds
the numbers from its queues; the worker's side decodes them. Imports SGLang, so it is imported only where SGLang runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from sglang.srt.managers import load_snapshot


class AccountedSnapshot(load_snapshot.LoadSnapshot):  # type: ignore[misc]
    """SGLang's snapshot with three more fields; None where the scheduler does not report them."""

    kv_transferring_tokens: int | None = None
    kv_cached_tokens: int | None = None
    kv_free_tokens: int | None = None


def read_accounts() -> None:
    """In the worker's process: decode snapshots with the added fields. SGLang's own decoder ignores them."""
    load_snapshot.snapshot_decoder = msgspec.msgpack.Decoder(AccountedSnapshot)


def account(snapshot: Any, inquirer: Any) -> AccountedSnapshot:
    """In the scheduler: the snapshot it is about to publish, with the added fields."""
    stats = inquirer.pool_stats_observer.get_pool_stats()
    fields: dict[str, int] = {}
    # For a hybrid pool SGLang reports only its fuller part, so the numbers would not add up to the capacity.
    if not stats.is_hybrid_swa:
        fields = {"kv_cached_tokens": stats.full_evictable_size, "kv_free_tokens": stats.full_available_size}
    # On prefill, transfers share prefix pages with each other and with the cache: SGLang does not count them apart.
    if inquirer.disaggregation_mode.value == "decode":
        queue = inquirer.get_disagg_decode_transfer_queue()
        page = inquirer.token_to_kv_pool_allocator.page_size
        fields["kv_transferring_tokens"] = held_tokens(queue, page)
    return AccountedSnapshot(**msgspec.structs.asdict(snapshot), **fields)


def held_tokens(queue: Any, page_size_tokens: int) -> int:
    """Pages, in tokens, that wait for KV, or whose request has ended while prefill may still write into them."""
    given_up = (entry[0] for entry in queue._deferred_releases)
    return sum(
        -(-request.seqlen // page_size_tokens) * page_size_tokens
        for request in (*_on_device(queue.queue), *_on_device(given_up))
    )


def _on_device(requests: Iterable[Any]) -> Iterable[Any]:
    return (request for request in requests if not request.host_staged)
