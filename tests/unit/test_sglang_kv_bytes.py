"""An engine with several ranks: the first rank reports KV bytes for all of them, and a dead rank is named."""

from __future__ import annotations

import pytest

from tandem.engine.sglang.children import scheduler_names
from tandem.engine.sglang.hooks.kv_accounting import Transfer, TransferStats, kv_shards


@pytest.mark.parametrize(
    ("heads", "heads_of_a_rank", "shards"),
    [(2, 2, 1), (2, 1, 2), (8, 4, 2), (8, 1, 8), (1, 1, 1)],
)
def test_kv_shards_are_the_ranks_with_different_heads(heads: int, heads_of_a_rank: int, shards: int) -> None:
    assert kv_shards(heads, heads_of_a_rank) == shards


def test_a_transfers_bytes_are_those_of_every_shard() -> None:
    stats = TransferStats()
    for size_bytes in (300, 200):
        stats.moved(7, size_bytes, now_s=1.0)
    transfer, _ = stats.close(7, "rid")
    assert transfer.moved_bytes_of(1) == 500
    assert transfer.moved_bytes_of(2) == 1000
    assert Transfer().moved_bytes_of(2) is None, "an aggregated engine moves none"


def test_schedulers_are_named_by_rank_only_where_there_are_several() -> None:
    assert scheduler_names(1) == ["scheduler"]
    assert scheduler_names(2) == ["scheduler of rank 0", "scheduler of rank 1"]
