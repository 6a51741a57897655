"""What the scheduler publishes as the contents of its cache, for SGLang's trees in Rust and in Python."""

from __future__ import annotations

import importlib.util
import os
import sys
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.domain.kv_blocks import block_hashes
from tandem.engine.sglang.environment import STANDINS
from tandem.engine.sglang.hooks import cache_dump

if importlib.util.find_spec("sglang") is None and not os.environ.get("CI"):
    pytest.skip("sglang is not installed here (requirements/cpu-engine.txt)", allow_module_level=True)
if str(STANDINS) not in sys.path:
    sys.path.append(str(STANDINS))

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

PAGE = 4
FIRST = list(range(100, 140))
BRANCH = [*FIRST[:12], *range(200, 216)]
LORA = "0123456789abcdef0123456789abcdef"
SEQUENCES: list[tuple[list[int], str | None, str | None]] = [
    (FIRST, None, None),
    (BRANCH, None, None),
    (FIRST, None, "tenant-a"),
    (BRANCH, None, "tenant-a"),
    (FIRST, LORA, None),
    ([*FIRST, 1, 2], None, None),
]
EXPECTED = {block for token_ids, lora, salt in SEQUENCES for block in block_hashes(token_ids, PAGE, salt, lora)}


def lora_names() -> Any:
    from sglang.srt.mem_cache.events import KvEventLoraNames

    names = KvEventLoraNames()
    names.register(SimpleNamespace(extra_key=LORA, lora_id=LORA), "an-adapter")
    return names


def rust_tree() -> Any:
    """SGLang's tree in Rust, with what `cache_dump` reads of its adapter."""
    import torch
    from sglang.srt.mem_cache.rust_tree_core import mem_cache

    parameters = mem_cache.TreeCoreInitParamsBinding(
        eviction_policy="lru", slru_protected_threshold=2, tlru_tail_budget=0, tlru_float_config=None, page_size=PAGE,
        is_write_back=False, enable_hicache=False, write_through_threshold=256, device="cpu",
        swa_sliding_window_size=None, swa_req_ring=False, enable_kv_cache_events=True, dynamo_kv_event_format=False,
        mamba_cache_chunk_size=None, mamba_max_states_per_path=None,
    )  # fmt: skip
    binding = mem_cache.RustUnifiedTreeCoreBinding(parameters, [0])
    for at, (token_ids, lora, salt) in enumerate(SEQUENCES):
        count = len(token_ids) // PAGE * PAGE
        binding.insert(
            mem_cache.InsertParamsBinding(
                key=array("q", token_ids[:count]),
                value=torch.arange(count) + 100 * at,
                extra_key=lora,
                cache_salt=salt,
                session_id=None,
                mamba_value=None,
                prev_prefix_len=0,
                swa_evicted_seqlen=0,
                swa_branching_seqlen=None,
                inserted_len=0,
                priority=0,
                track_adopted_ranges=False,
                rotation_base=None,
            )
        )
    recorder = SimpleNamespace(_lora_names=lora_names())
    return SimpleNamespace(tree_core=SimpleNamespace(_binding=binding, page_size=PAGE, kv_events=recorder))


def python_tree() -> Any:
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    tree = RadixCache.create_simulated(page_size=PAGE, enable_kv_cache_events=True, kv_event_lora_names=lora_names())
    for token_ids, lora, salt in SEQUENCES:
        key = RadixKey(array("q", token_ids), lora, cache_salt=salt)
        tree.insert(InsertParams(key=key, value=torch.arange(len(token_ids))))
    return tree


def test_dump_of_the_tree_in_rust_has_every_block_once(capfd: pytest.CaptureFixture[str]) -> None:
    found = cache_dump.cached_blocks(rust_tree())
    assert (set(found), len(found)) == (EXPECTED, len(EXPECTED))
    assert capfd.readouterr().out == "", "the tree was printed for the dump only"


def test_dump_of_the_tree_in_python_has_every_block_once_and_makes_no_event() -> None:
    tree = python_tree()
    pending = len(tree.kv_events._queue)
    found = cache_dump.cached_blocks(tree)
    assert (set(found), len(found)) == (EXPECTED, len(EXPECTED))
    assert len(tree.take_events()) == pending
