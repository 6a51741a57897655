"""Health check of the engine; the worker's gRPC health status is set from its result.

Output tokens prove that the engine works; after a period without any, a canary generation is run. A stalled engine, one
that cannot hand over KV, or an unreachable bootstrap server is unhealthy at once, without waiting for a canary to time
out. Reports changes to the worker host, which decides what to do about them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from tandem.clock import Clock, monotonic
from tandem.domain.network_address import bare_host
from tandem.engine.port import BootstrapAddress, Engine
from tandem.errors import EngineFailed, StartError, TandemError

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.5
CONNECT_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Periods:
    """When a canary runs, and how long it may take."""

    proof_s: float
    """Time without an output token after which a canary runs."""
    canary_s: float
    """Timeout of the canary; includes its wait in the engine's queue behind running requests."""


class EngineHealth:
    """Checks one engine that has passed its first canary."""

    def __init__(
        self,
        engine: Engine,
        batch_count: Callable[[], int],
        periods: Periods,
        on_change: Callable[[str | None], Awaitable[None]],
        clock: Clock = monotonic,
    ) -> None:
        """`batch_count` grows with every output of the engine; `on_change` gets the new trouble, None on recovery."""
        self._engine = engine
        self._batch_count = batch_count
        self._periods = periods
        self._on_change = on_change
        self._clock = clock
        self._trouble: str | None = None
        self._is_paused = False

    @property
    def trouble(self) -> str | None:
        """Why the engine is unhealthy, in one sentence; None while it is healthy."""
        return self._trouble

    async def watch(self) -> None:
        """Check the engine periodically until cancelled."""
        proved_s, batches = self._clock(), self._batch_count()
        while True:
            await asyncio.sleep(min(CHECK_INTERVAL_S, self._periods.proof_s / 2))
            if self._is_paused:
                # The engine that comes out of it has passed a canary.
                proved_s, batches = self._clock(), self._batch_count()
                continue
            if (trouble := await self._passive_check()) is not None:
                await self._report(trouble)
                # Tokens from before the trouble do not prove that the engine works after it: run a canary at once.
                proved_s, batches = float("-inf"), self._batch_count()
                continue
            if self._batch_count() != batches:
                proved_s, batches = self._clock(), self._batch_count()
                await self._report(None)
            elif self._clock() - proved_s >= self._periods.proof_s:
                trouble = await self._canary()
                await self._report(trouble)
                proved_s, batches = self._clock(), self._batch_count()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Check nothing, and report nothing: the engine changes its role, and must pass a canary before it is used."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    async def note_proof(self) -> None:
        """The engine has passed a canary just now, whatever its predecessor's trouble was."""
        await self._report(None)

    async def _passive_check(self) -> str | None:
        """Trouble that can be detected without a generation."""
        stall = self._engine.stalled()
        if stall is not None:
            return stall
        handover = self._engine.handover_trouble()
        if handover is not None:
            return handover
        bootstrap = self._engine.bootstrap_address()
        return None if bootstrap is None else await _unreachable(bootstrap)

    async def _canary(self) -> str | None:
        try:
            async with asyncio.timeout(self._periods.canary_s):
                await self._engine.canary()
        except TimeoutError:
            return f"engine canary timed out after {self._periods.canary_s:g} s"
        except TandemError as problem:
            return f"engine canary failed: {problem.message}"
        return None

    async def _report(self, trouble: str | None) -> None:
        # A check that was under way when the pause began says nothing of the engine after it.
        if trouble == self._trouble or self._is_paused:
            return
        if trouble is not None:
            log.error("engine unhealthy, health status is now NOT_SERVING: %s", trouble)
        else:
            log.info("engine healthy again, health status is now SERVING")
        self._trouble = trouble
        await self._on_change(trouble)


async def pass_canary(engine: Engine, timeout_s: float) -> None:
    """Run the first canary of an engine.

    Raises:
        StartError: it failed, or took longer than `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await engine.canary()
    except TimeoutError:
        raise StartError(f"engine canary timed out after {timeout_s:g} s") from None
    except EngineFailed as problem:
        raise StartError(f"engine canary failed: {problem}") from None


async def _unreachable(bootstrap: BootstrapAddress) -> str | None:
    """Why decode engines cannot connect to the bootstrap server; None when they can."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(bare_host(bootstrap.host), bootstrap.port)
    except (OSError, TimeoutError) as problem:
        return f"bootstrap server {bootstrap.host}:{bootstrap.port} is unreachable: {problem or 'connect timed out'}"
    writer.close()
    return None
