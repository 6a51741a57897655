"""Prefix caches as plain sets of prefixes: what an index of cached blocks must agree with."""

from __future__ import annotations

import functools

from tandem.domain.kv_blocks import block_hashes

Prefix = tuple[int, ...]


@functools.cache
def hash_of(prefix: Prefix, block_size_tokens: int) -> int:
    """Hash of the last block of a prefix of full blocks."""
    return block_hashes(prefix, block_size_tokens)[-1]


class PrefixTree:
    """The cache of one engine: prefixes of full blocks, each with all shorter ones."""

    def __init__(self, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        self.held: set[Prefix] = set()

    def prefixes(self, tokens: Prefix) -> list[Prefix]:
        """Prefixes of full blocks, the shortest first."""
        size = self.block_size_tokens
        return [tokens[:end] for end in range(size, len(tokens) + 1, size)]

    def hashes(self, prefixes: list[Prefix]) -> list[int]:
        return [hash_of(prefix, self.block_size_tokens) for prefix in prefixes]

    def store(self, tokens: Prefix) -> list[int]:
        """Cache a sequence; returns the hashes of its new blocks."""
        new = [prefix for prefix in self.prefixes(tokens) if prefix not in self.held]
        self.held.update(new)
        return self.hashes(new)

    def evict(self, tokens: Prefix) -> list[int]:
        """Remove a prefix and what continues it; returns the hashes, parents first."""
        gone = sorted(
            (prefix for prefix in self.held if prefix[: len(tokens)] == tokens), key=lambda one: (len(one), one)
        )
        self.held.difference_update(gone)
        return self.hashes(gone)

    def cached_tokens(self, tokens: Prefix) -> int:
        """Leading cached tokens of a prompt, without its last one."""
        found = 0
        for prefix in self.prefixes(tokens[:-1]):
            if prefix not in self.held:
                break
            found = len(prefix)
        return found
