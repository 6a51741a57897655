"""Which hand-overs have their KV compared: both engines of a pair choose the same ones, without a message."""

from __future__ import annotations

_MIX, _MIX_BITS = 0x9E3779B97F4A7C15, 64
"""Spreads rooms that are counted up, as those of a benchmark may be."""


def is_sampled(room: int | None, share: float) -> bool:
    """Whether a hand-over belongs to the share. Each one of a larger share includes those of a smaller one.

    Args:
        room: its bootstrap room, random; None: a canary, which hands nothing over.
        share: 0 (none) to 1 (all).
    """
    if room is None or share <= 0:
        return False
    mixed = (room * _MIX) % (1 << _MIX_BITS)
    return share >= 1 or (mixed ^ mixed >> 32) % (1 << 32) < share * (1 << 32)
