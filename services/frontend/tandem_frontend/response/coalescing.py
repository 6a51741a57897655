"""When a chunk leaves: at once while this process has time, and with what follows while it has not.

A chunk costs the same whether it holds one token or ten. So while the event loop is idle enough, each token leaves as
it comes; the busier the loop is, the longer a stream's next chunk is held, up to a bound. A stream whose tokens are
further apart than that never waits. Owns the one timer of all held streams; how busy the loop is `loop_load` measures.
What a chunk holds is the relay's business, and however it is cut the text, tokens and log probabilities are the same.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from tandem.service.loop_load import LoopLoad

log = logging.getLogger(__name__)

HOLD_MAX_S = 0.025
"""Default of the bound."""
FLUSH_S = 0.005
"""Held chunks are looked at so often, all streams' together."""


class Held(Protocol):
    """A stream with a chunk that waits."""

    due_s: float
    """On the loop's clock."""

    def flush(self) -> None:
        """Send the chunk. A stream that cannot is to end itself; whatever it raises is no other stream's business."""
        ...


class Coalescing:
    """Of one process."""

    def __init__(self, hold_max_s: float = HOLD_MAX_S, load: LoopLoad | None = None) -> None:
        """`hold_max_s` is the bound for requests that ask for none of their own; 0: no chunk is ever held."""
        self.hold_max_s = hold_max_s
        self._load = load or LoopLoad()
        self._held: list[Held] = []
        self._is_flushing = False

    @property
    def pressure(self) -> float:
        """From 0 (each token leaves as it comes) to 1 (chunks are held for the bound)."""
        return self._load.pressure

    def hold(self, stream: Held) -> None:
        """Flush a stream soon after its `due_s`."""
        self._held.append(stream)
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush_due)

    def _flush_due(self) -> None:
        loop = asyncio.get_running_loop()
        # What becomes due before the next look leaves now: a bound is kept, not overrun.
        soon_s = loop.time() + FLUSH_S
        due = [stream for stream in self._held if stream.due_s <= soon_s]
        self._held = [stream for stream in self._held if stream.due_s > soon_s]
        try:
            for stream in due:
                try:
                    stream.flush()
                except Exception:
                    log.exception("a held chunk could not be sent")
        finally:
            self._is_flushing = bool(self._held)
            if self._is_flushing:
                loop.call_later(FLUSH_S, self._flush_due)
