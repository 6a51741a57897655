"""Whether the engine can be trusted with a request now: what a worker's health tells is only as true as this.

Proof is the engine's own work: tokens that come, and when none have come for a while, a canary generation. Before the
proof can fail, an engine that is known to be stalled, or a bootstrap server that nobody can reach, is enough. Says so;
what follows is the host's business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.engine.port import BootstrapAddress, Engine
from tandem.errors import TandemError

log = logging.getLogger(__name__)

LOOK_S = 0.5
CONNECT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Periods:
    """How often an engine must prove itself."""

    proof_s: float
    """After so long without a token, a canary runs."""
    canary_s: float
    """Most time for that canary: it waits its turn behind whatever the engine does."""


class EngineHealth:
    """Looks after one engine that has passed its first canary."""

    def __init__(
        self,
        engine: Engine,
        batch_count: Callable[[], int],
        periods: Periods,
        on_change: Callable[[str | None], Awaitable[None]],
        clock: Clock = monotonic,
    ) -> None:
        """`batch_count` grows with every answer of the engine; `on_change` is told the trouble, or None at its end."""
        self._engine = engine
        self._batch_count = batch_count
        self._periods = periods
        self._on_change = on_change
        self._clock = clock
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why the engine cannot be trusted now, in one sentence; None when it can."""
        return self._trouble

    async def watch(self) -> None:
        """Look for ever."""
        proved_s, batches = self._clock(), self._batch_count()
        while True:
            await asyncio.sleep(min(LOOK_S, self._periods.proof_s / 2))
            if (trouble := await self._obvious()) is not None:
                await self._say(trouble)
                # What the engine did before its trouble proves nothing after it.
                proved_s, batches = float("-inf"), self._batch_count()
                continue
            if self._batch_count() != batches:
                proved_s, batches = self._clock(), self._batch_count()
                await self._say(None)
            elif self._clock() - proved_s >= self._periods.proof_s:
                trouble = await self._canary()
                await self._say(trouble)
                proved_s, batches = self._clock(), self._batch_count()

    async def _obvious(self) -> str | None:
        """Trouble that is known without asking the engine for a token."""
        stall = self._engine.stalled()
        if stall is not None:
            return stall
        bootstrap = self._engine.bootstrap_address()
        return None if bootstrap is None else await _unreachable(bootstrap)

    async def _canary(self) -> str | None:
        try:
            async with asyncio.timeout(self._periods.canary_s):
                await self._engine.canary()
        except TimeoutError:
            return f"the engine has not answered a canary within {self._periods.canary_s:g} s"
        except TandemError as problem:
            return f"the engine failed a canary: {problem.message}"
        return None

    async def _say(self, trouble: str | None) -> None:
        if trouble == self._trouble:
            return
        if trouble is not None:
            log.error("not serving: %s", trouble)
        else:
            log.warning("serving again: the engine works")
        self._trouble = trouble
        await self._on_change(trouble)


async def _unreachable(bootstrap: BootstrapAddress) -> str | None:
    """Why decode engines cannot meet this one; None when they can."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(bootstrap.host.strip("[]"), bootstrap.port)
    except (OSError, TimeoutError) as problem:
        return f"the bootstrap server at {bootstrap.host}:{bootstrap.port} cannot be reached: {problem or 'no answer'}"
    writer.close()
    return None
