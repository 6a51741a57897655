"""The hash rule of KV blocks: fixed values, and a second writing of the rule."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.domain.kv_blocks import BlockHashes, block_hashes

PROMPT = list(range(100, 140))
LORA = "0123456789abcdef0123456789abcdef"

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=64)
sizes = st.integers(1, 17)
salts = st.none() | st.text(min_size=1, max_size=8)


def _slowly(ids: list[int], size: int, salt: str | None) -> list[int]:
    digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest() if salt else b""
    hashes = []
    for start in range(0, len(ids) - size + 1, size):
        digest = hashlib.sha256(digest + struct.pack(f"<{size}I", *ids[start : start + size])).digest()
        hashes.append(struct.unpack(">q", digest[:8])[0])
    return hashes


@pytest.mark.parametrize(
    ("salt", "lora", "expected"),
    [
        (None, None, [3783480490812179100, -5523102609743566000]),
        ("tenant-a", None, [-5944164382470339029, 9098601118313626952]),
        (None, LORA, [3825501879007452593, 7420139444006777339]),
        ("tenant-a", LORA, [-6085999920224970278, 3150156880810215354]),
    ],
)
def test_hashes_of_a_prompt_are_those_that_sglang_publishes(
    salt: str | None, lora: str | None, expected: list[int]
) -> None:
    # Computed with SGLang 0.5.23's own functions (get_hash_str, namespaced_block_hash).
    assert block_hashes(PROMPT, 16, salt, lora) == expected


@given(token_ids, sizes, salts)
def test_hashes_follow_the_rule_for_any_prompt(ids: list[int], size: int, salt: str | None) -> None:
    assert block_hashes(ids, size, salt) == _slowly(ids, size, salt)


@given(token_ids, sizes, salts, st.none() | st.just(LORA), st.lists(st.integers(0, 64)))
def test_growing_sequence_has_the_hashes_of_the_whole(
    ids: list[int], size: int, salt: str | None, lora: str | None, ends: list[int]
) -> None:
    growing = BlockHashes(size, salt, lora)
    for end in [*ends, len(ids)]:
        assert growing.of(ids[:end]) == block_hashes(ids[:end], size, salt, lora)


def test_empty_salt_is_no_salt() -> None:
    assert block_hashes(PROMPT, 4, "") == block_hashes(PROMPT, 4)


def test_block_size_below_one_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        BlockHashes(0)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_id_beyond_32_bits_is_rejected(token_id: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([token_id], 1)
