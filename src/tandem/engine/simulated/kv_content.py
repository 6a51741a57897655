"""The contents of the KV that a simulated hand-over moves, what a fault does to them, and their digest.

A row for each token that moves, expanded from the hash state, which stands for the KV: it is what decode receives.
Pages are slices of the rows, so the digest does not depend on their size. Damage that is not noticed spoils the state,
as damaged KV spoils what a model computes from it.
"""

from __future__ import annotations

import random
from hashlib import blake2b, shake_128

from tandem.engine.simulated.tokens import STATE_BYTES, SequenceState

DAMAGES = ("flip_bit", "overwrite_page", "foreign_page", "late_write", "missing_page")
"""Kinds of faults at the point `kv_arrived`."""
DIGEST_BYTES = 8
ROW_BYTES = 8


class KvContent:
    """The rows that are handed over for one request."""

    def __init__(self, state: SequenceState, tokens: int) -> None:
        """Those of the last `tokens` tokens of the sequence; the others are in decode's prefix cache."""
        self._state = state
        self._sent = shake_128(state).digest(tokens * ROW_BYTES)
        self._rows = bytearray(self._sent)

    def damage(self, kind: str, page_size_tokens: int, draw: random.Random) -> None:
        """Do what one of DAMAGES names to these rows; nothing if none was handed over."""
        if not self._rows:
            return
        page_bytes = page_size_tokens * ROW_BYTES
        at = draw.randrange(0, len(self._rows), page_bytes)
        size = len(self._rows[at : at + page_bytes])
        if kind == "flip_bit":
            self._rows[draw.randrange(len(self._rows))] ^= 1 << draw.randrange(8)
        elif kind == "overwrite_page":
            self._rows[at : at + size] = draw.randbytes(size)
        elif kind == "foreign_page":
            other = shake_128(draw.randbytes(STATE_BYTES)).digest(at + size)
            self._rows[at : at + size] = other[at:]
        else:
            # The page still is as the request before has left it: the write comes too late, or never.
            self._rows[at : at + size] = bytes(size)

    def digest(self) -> str:
        """Of the rows as they are now; hexadecimal."""
        return blake2b(self._rows, digest_size=DIGEST_BYTES, person=b"kv").hexdigest()

    def spoiled(self) -> SequenceState:
        """The state that a model would compute from these rows: the one sent, if they are what was sent."""
        if self._rows == self._sent:
            return self._state
        return blake2b(self._state + self._rows, digest_size=STATE_BYTES, person=b"spoiled").digest()
