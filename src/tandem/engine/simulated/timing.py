"""How long things take in the simulated engine, and the clock by which it waits.

Time and randomness are passed in, so that a test can replace the one and repeat the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Protocol

from tandem.engine.simulated.options import Options


class Clock(Protocol):
    """Where the engine takes its time from."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    async def sleep(self, duration_s: float) -> None:
        """Wait; may be cancelled."""
        ...


class SystemClock:
    """The machine's clock and the event loop's sleep."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()

    async def sleep(self, duration_s: float) -> None:
        """Wait; may be cancelled."""
        await asyncio.sleep(duration_s)


class Timing:
    """Durations of prefill, transfer and decode steps, jittered by a seeded generator."""

    def __init__(self, options: Options, seed: int) -> None:
        self._options = options
        self._random = random.Random(seed)  # noqa: S311 -- repeatable jitter, no secret

    def prefill_s(self, tokens: int) -> float:
        """Time to compute the KV of so many prompt tokens."""
        return self._jittered(tokens / self._options.prefill_tokens_per_s)

    def transfer_s(self, size_bytes: int) -> float:
        """Time to move so many bytes of KV."""
        return self._jittered(size_bytes / self._options.transfer_bytes_per_s)

    def decode_step_s(self) -> float:
        """Time until the next token of a request."""
        return self._jittered(self._options.decode_step_s)

    def _jittered(self, duration_s: float) -> float:
        return duration_s * (1 + self._options.jitter * self._random.uniform(-1, 1))
