"""Virtual time: an event loop whose clock jumps to the next timer as soon as nothing else is left to do.

With `LoopClock` and `MemoryNetwork`, engines on this loop spend no real time and meet no chance that is not seeded: a
run with the same seeds has the same history. Not for anything with real sockets or threads.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
EPOCH_TIME_S = 1_000_000_000.0


class Deadlock(Exception):
    """Everything waits, and nothing will ever happen."""


class _JumpingSelector(selectors.SelectSelector):
    """Never waits: tells the loop instead how far its clock may go."""

    def __init__(self) -> None:
        super().__init__()
        self.jump: Callable[[float | None], None] = lambda _: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now; the clock moves on if that is nothing."""
        ready = super().select(0)
        if not ready and timeout != 0:
            self.jump(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop on virtual time."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.jump = self._jump
        self._now_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call at once, on this thread: the end of another thread has no place in virtual time."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as problem:
            future.set_exception(problem)
        return future

    def _jump(self, duration_s: float | None) -> None:
        if duration_s is None:
            raise Deadlock("every task waits, and no timer is set")
        self._now_s += duration_s


class LoopClock:
    """The running loop's time, as seconds since an epoch of its own."""

    def time_s(self) -> float:
        """Seconds since the Unix epoch, as far as anybody in here knows."""
        return EPOCH_TIME_S + asyncio.get_running_loop().time()

    async def sleep(self, duration_s: float) -> None:
        """Wait; may be cancelled."""
        await asyncio.sleep(duration_s)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on virtual time.

    Raises:
        Deadlock: it waits for something that cannot happen.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
