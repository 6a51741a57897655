"""The digest of KV in host memory, on pools that lay out the same tokens differently."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.sglang.environment import KV_CHECK_SHARE
from tandem.engine.sglang.hooks import kv_check

numpy = pytest.importorskip("numpy")
pytest.importorskip("xxhash", reason="comes with the CPU engine (requirements/cpu-engine.txt)")

LAYERS, WIDTH, TOKENS = 3, 24, 75
DRAW = random.Random(5)
ROWS = [[DRAW.randbytes(WIDTH) for _ in range(TOKENS)] for _ in range(2 * LAYERS)]
"""For each buffer (K and V of each layer), the row of each token."""


class Pool:
    """Buffers of pages that hold ROWS at pages drawn at random, among rows of other requests."""

    def __init__(self, page: int, seed: int) -> None:
        draw = random.Random(seed)
        pages = -(-TOKENS // page)
        places = draw.sample(range(1, 2 * pages + 9), pages)
        self.page = page
        self.slots = [places[token // page] * page + token % page for token in range(TOKENS)]
        rows = (2 * pages + 10) * page
        self.buffers = [numpy.frombuffer(bytearray(draw.randbytes(rows * WIDTH)), dtype=numpy.uint8) for _ in ROWS]
        for buffer, own in zip(self.buffers, ROWS, strict=True):
            for slot, row in zip(self.slots, own, strict=True):
                buffer[slot * WIDTH : (slot + 1) * WIDTH] = list(row)

    def digest(self, begin: int = 0) -> int:
        addresses = [buffer.ctypes.data for buffer in self.buffers]
        return kv_check.digest([(self.slots[begin:], addresses, [WIDTH] * len(addresses))])

    def row(self, buffer: int, token: int) -> slice:
        return slice(self.slots[token] * WIDTH, (self.slots[token] + 1) * WIDTH)


def test_a_digest_depends_on_neither_the_page_size_nor_the_pages() -> None:
    pools = [Pool(page, seed) for page in (1, 16, 64) for seed in range(3)]
    assert len({tuple(pool.slots) for pool in pools}) == len(pools)
    assert len({pool.digest() for pool in pools}) == 1
    assert len({pool.digest(32) for pool in pools}) == 1, "of the tail, where decode holds the first tokens"
    assert pools[0].digest(32) != pools[0].digest()


@pytest.mark.parametrize("page", [1, 16])
def test_a_digest_notices_a_bit_a_row_and_two_rows_in_each_others_place(page: int) -> None:
    right = Pool(page, 1).digest()
    for number in range(300):
        pool, draw = Pool(page, number), random.Random(number)
        buffer, token, other = draw.randrange(2 * LAYERS), draw.randrange(TOKENS), draw.randrange(TOKENS)
        content = pool.buffers[buffer]
        here, there = pool.row(buffer, token), pool.row(buffer, (other + 1) % TOKENS if other == token else other)
        if number % 3 == 0:
            content[here.start + draw.randrange(WIDTH)] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            content[here] = 0
        else:
            content[here], content[there] = content[there].copy(), content[here].copy()
        assert pool.digest() != right, number


@pytest.mark.parametrize("limit_bytes", [0, 1 << 40])
def test_rows_in_place_and_rows_copied_together_have_one_digest(
    limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pool(16, 1).digest()
    monkeypatch.setattr(kv_check, "RUN_BYTES_MIN", limit_bytes)
    monkeypatch.setattr(kv_check, "GATHERED_BYTES_MAX", 10 * WIDTH)
    assert Pool(16, 2).digest() == expected


def test_a_digest_is_never_the_number_that_means_none() -> None:
    assert kv_check.digest([]) != kv_check.NO_DIGEST
    assert 0 < Pool(16, 1).digest() < 1 << kv_check.DIGEST_BITS, "what SGLang's metadata can carry"


def layout(**changed: Any) -> SimpleNamespace:
    usual: dict[str, Any] = {
        "page_size": 16,
        "kv_cache_dtype_str": "float32",
        "kv_layout": None,
        "swa_kv_cache_layout": None,
        "state_types": [],
        "kv_item_lens": [16 * WIDTH] * 4,
        "state_item_lens": [],
    }
    return SimpleNamespace(**usual | changed)


def test_digests_are_comparable_where_the_rows_are_alike() -> None:
    usual = kv_check.signature(layout(), "cpu")
    assert usual == kv_check.signature(layout(page_size=64, kv_item_lens=[64 * WIDTH] * 4), "cpu")
    others = [
        layout(kv_cache_dtype_str="bfloat16"),
        layout(kv_item_lens=[16 * WIDTH] * 2),
        layout(kv_item_lens=[8 * WIDTH] * 4),
    ]
    assert usual not in [kv_check.signature(other, "cpu") for other in others], "another type, layers, or ranks"
    assert usual != kv_check.signature(layout(), "cuda"), "another algorithm"


@pytest.mark.parametrize(
    ("share", "computer", "compared"),
    [
        ("1", SimpleNamespace(), [1, 2]),
        ("0", SimpleNamespace(), []),
        ("1", SimpleNamespace(tandem_kernel=None), []),
        ("1", SimpleNamespace(tandem_kernel=object()), [1, 2]),
    ],
    ids=["on", "off", "a GPU without the kernel", "a GPU"],
)
def test_decode_compares_what_has_a_digest_and_can_be_digested(
    share: str, computer: Any, compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KV_CHECK_SHARE, share)
    requests = [SimpleNamespace(bootstrap_room=room, expected_kv_checksum=room * 10) for room in (0, 1, 2)]
    seen: list[int] = []

    def compare(scheduler: Any, batch: Any) -> None:
        seen.extend(request.bootstrap_room for request in batch.reqs if request.expected_kv_checksum)

    kv_check._verify(compare, SimpleNamespace(kv_checksum_computer=computer), SimpleNamespace(reqs=requests))
    assert seen == compared
    assert [request.bootstrap_room for request in requests if hasattr(request, kv_check.CHECKED)] == compared
