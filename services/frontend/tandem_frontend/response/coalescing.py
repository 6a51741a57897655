"""How long a busy process holds chunks: the limit, the pressure and the timer. `Relay._offer` decides for each chunk.

A chunk costs the same with one token as with ten. So while the event loop is idle, each token is sent as it arrives;
the busier the loop, the longer a stream's next chunk is held, up to a limit. A chunk is held only if the stream's next
token can arrive before that limit; otherwise it would cost time and save nothing. Owns the one timer of all held
streams; `loop_load` measures the loop. The relay fills the chunks: however the stream is cut, text, tokens and log
probabilities are the same.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from tandem.service.loop_load import LoopLoad

log = logging.getLogger(__name__)

HOLD_MAX_S = 0.025
"""Default limit."""
FLUSH_S = 0.003
"""Interval at which due chunks of all streams are sent."""


class Held(Protocol):
    """A stream with a held chunk."""

    due_s: float
    """On the loop's clock."""

    def flush(self) -> None:
        """Send the chunk. A stream that cannot must end itself; what it raises affects no other stream."""
        ...


class Coalescing:
    """Holds the chunks of one process."""

    def __init__(self, hold_max_s: float = HOLD_MAX_S, load: LoopLoad | None = None) -> None:
        """`hold_max_s` is the limit for requests without their own; 0: no chunk is ever held."""
        self.hold_max_s = hold_max_s
        self._load = load or LoopLoad()
        self._held: list[Held] = []
        self._is_flushing = False

    @property
    def pressure(self) -> float:
        """From 0 (each token is sent as it arrives) to 1 (chunks are held up to the limit)."""
        return self._load.pressure

    def hold(self, stream: Held) -> None:
        """Flush a stream soon after its `due_s`."""
        self._held.append(stream)
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_later(FLUSH_S, self._flush_due)

    def _flush_due(self) -> None:
        loop = asyncio.get_running_loop()
        # Chunks that become due before the next flush are sent now: the limit must not be exceeded.
        soon_s = loop.time() + FLUSH_S
        due = [stream for stream in self._held if stream.due_s <= soon_s]
        self._held = [stream for stream in self._held if stream.due_s > soon_s]
        try:
            for stream in due:
                try:
                    stream.flush()
                except Exception:  # a defect of one stream must not hold back the others
                    log.exception("bug in this frontend while it sent a held chunk; other streams are not affected")
        finally:
            self._is_flushing = bool(self._held)
            if self._is_flushing:
                loop.call_later(FLUSH_S, self._flush_due)
