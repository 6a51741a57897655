"""Hashes of the full KV blocks of a sequence, by the rule "sha256-chain-v1" that SGLang's KV events follow.

A block's digest is SHA-256 over the digest of the block before it and its token ids as little-endian uint32; its hash
is the digest's first 8 bytes as a signed big-endian integer. The first block has no digest before it; under a cache
salt it has SHA-256 of "sglang-cache-salt-v1", a zero byte and the salt. So equal hashes mean equal tokens from the
start, in one salt.

A LoRA adapter does not change the chain. SGLang hashes each hash of the chain once more, over a seed that is made from
the id which the engine gave the adapter: `lora` is that id, not its name. SGLang would draw it at random; workers give
adapters the id `tandem.domain.adapter.Adapter.engine_id`, which all of them and the frontends compute alike.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

HASH_RULE = "sha256-chain-v1"
"""Name of this rule in the workers' contract."""
_SALT_TAG = b"sglang-cache-salt-v1\0"
_LORA_TAG = b"sglang-kv-event-namespace-v1"
_HASH_BYTES = 8
_ABSENT, _PRESENT = b"\0", b"\1"


class BlockHashes:
    """Hashes of the full blocks of one growing sequence; each block is hashed once."""

    def __init__(self, block_size_tokens: int, cache_salt: str | None = None, lora: str | None = None) -> None:
        """An empty salt is none, as in SGLang; see the module about `lora`.

        Raises:
            ValueError: the block size is below 1.
        """
        if block_size_tokens < 1:
            raise ValueError(f"a block has at least 1 token, not {block_size_tokens}")
        self._block_size_tokens = block_size_tokens
        self._digest = first_digest(cache_salt)
        self._lora = lora
        self._hashes: list[int] = []

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Hashes of the full blocks of `token_ids`, which must extend the sequence of earlier calls or be its prefix.

        Raises:
            OverflowError: a token id is negative or does not fit in 32 bits.
        """
        known, size = len(self._hashes), self._block_size_tokens
        count = len(token_ids) // size
        if count > known:
            digests = chain(self._digest, token_ids[known * size : count * size], size)
            self._digest = digests[-1]
            self._hashes += hashes_of(digests, self._lora)
        return self._hashes[:count]


def block_hashes(
    token_ids: Sequence[int], block_size_tokens: int, cache_salt: str | None = None, lora: str | None = None
) -> list[int]:
    """Hashes of the full blocks of a sequence, signed 64-bit; the tokens after the last full block have none.

    Raises:
        ValueError: the block size is below 1.
        OverflowError: a token id is negative or does not fit in 32 bits.
    """
    return BlockHashes(block_size_tokens, cache_salt, lora).of(token_ids)


def first_digest(cache_salt: str | None) -> bytes:
    """What stands for the digest before the first block."""
    return sha256(_SALT_TAG + cache_salt.encode()).digest() if cache_salt else b""


def chain(before: bytes, token_ids: Sequence[int], block_size_tokens: int) -> list[bytes]:
    """Digests of full blocks that follow the block with the digest `before`.

    Raises:
        OverflowError: a token id is negative or does not fit in 32 bits.
    """
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    content, step, digests = ids.tobytes(), block_size_tokens * ids.itemsize, []
    for start in range(0, len(content), step):
        before = sha256(before + content[start : start + step]).digest()
        digests.append(before)
    return digests


def hashes_of(digests: Sequence[bytes], lora: str | None = None) -> list[int]:
    """Hashes of blocks by their digests."""
    short = [digest[:_HASH_BYTES] for digest in digests]
    if lora is not None:
        seed = _lora_seed(lora)
        short = [sha256(seed + one).digest()[:_HASH_BYTES] for one in short]
    hashes = array("q", b"".join(short))
    if sys.byteorder == "little":
        hashes.byteswap()
    return hashes.tolist()


def _lora_seed(lora: str) -> bytes:
    """Seed of one adapter's hashes: its id with its length, and no second part."""
    name = lora.encode()
    return sha256(_LORA_TAG + _PRESENT + len(name).to_bytes(8, "little") + name + _ABSENT).digest()
