"""The blocks of one prompt: their hashes by block size, computed once and only as far as someone asks.

Pure. `tandem.domain.kv_blocks` owns the rule of the hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.domain.kv_blocks import BlockHashes


class PromptBlocks:
    """Hashes of a prompt's blocks. A prompt that no worker has cached costs one block's hash, not all of them."""

    def __init__(self, token_ids: Sequence[int], cache_salt: str | None = None, lora: str | None = None) -> None:
        """Hashes nothing yet. Token ids are 0 or more and below 2^32; salt and `lora` as in `kv_blocks`."""
        self._token_ids = token_ids
        self._cache_salt = cache_salt
        self._lora = lora
        self._chains: dict[int, BlockHashes] = {}
        """By block size in tokens."""
        self._hashes: dict[int, list[int]] = {}

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self._token_ids)

    def count(self, block_size_tokens: int) -> int:
        """Blocks that a cache can answer: full ones without the last token, which an engine always computes."""
        return max(0, self.prompt_tokens - 1) // block_size_tokens

    def hashes(self, block_size_tokens: int, count: int) -> list[int]:
        """Hashes of at least the first `count` blocks; not to be changed."""
        known = self._hashes.get(block_size_tokens, [])
        if len(known) >= count:
            return known
        chain = self._chains.get(block_size_tokens)
        if chain is None:
            chain = BlockHashes(block_size_tokens, self._cache_salt, self._lora)
            self._chains[block_size_tokens] = chain
        known = chain.of(self._token_ids[: count * block_size_tokens])
        self._hashes[block_size_tokens] = known
        return known
