"""Virtual time: an event loop whose clock jumps to the next timer when no task is ready.

With `LoopClock` and `MemoryNetwork`, engines on this loop take no real time and are deterministic: the same seeds give
the same history. Not usable with real sockets or threads.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
EPOCH_TIME_S = 1_000_000_000.0


class Deadlock(Exception):
    """All tasks wait, and no timer is set."""


class _JumpingSelector(selectors.SelectSelector):
    """Never blocks; advances the clock of the loop instead."""

    def __init__(self) -> None:
        super().__init__()
        self.jump: Callable[[float | None], None] = lambda _: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """The ready events; if there are none, the clock advances by `timeout` seconds."""
        ready = super().select(0)
        if not ready and timeout != 0:
            self.jump(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.jump = self._jump
        self._now_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call immediately on this thread: virtual time cannot wait for another thread."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as problem:  # a future carries any exception of the function
            future.set_exception(problem)
        return future

    def _jump(self, duration_s: float | None) -> None:
        if duration_s is None:
            raise Deadlock("every task waits, and no timer is set")
        self._now_s += duration_s


class LoopClock:
    """Wall clock that follows the running loop's virtual time."""

    def time_s(self) -> float:
        """Simulated seconds since the Unix epoch."""
        return EPOCH_TIME_S + asyncio.get_running_loop().time()

    async def sleep(self, duration_s: float) -> None:
        """Sleep in virtual time."""
        await asyncio.sleep(duration_s)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to completion in virtual time.

    Raises:
        Deadlock: all tasks wait, and no timer is set.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
