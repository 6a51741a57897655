"""The processes SGLang starts for one engine: watched from the moment they exist, ended together.

Owns the sentence that says how one died. Watches by the kernel's own signal (the process's sentinel becomes readable),
so that a death is known at once, where SGLang's watchdog looks once a second and then ends the whole worker. A process
that is only stopped sends no signal: it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing.resource_tracker
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from tandem.engine.sglang import reports

END_TIMEOUT_S = 5.0
STOPPED_STATES = ("T", "t")
"""Of /proc/PID/stat: by a signal, and by a debugger."""


def process_state(pid: int | None) -> str:
    """The kernel's letter for what a process does; "" where the system has no /proc.

    Raises:
        OSError: there is no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if pid is None or not stat.parent.parent.is_dir():
        return ""
    # The name in parentheses may hold anything, so the state is looked for behind its end.
    return stat.read_text().rpartition(")")[2].split()[0]


class Children:
    """Child processes of one engine. Made on the event loop; `add` is called on the thread that starts them."""

    def __init__(self, report_file: Path, on_death: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._report_file = report_file
        self._on_death = on_death
        self._processes: list[tuple[str, BaseProcess]] = []
        self._watched: set[int] = set()
        self._ending = False
        self._had_tracker = _tracker_runs()

    def add(self, name: str, process: BaseProcess) -> None:
        """Take charge of a process that has just been started."""
        self._processes.append((name, process))
        if self._ending:
            process.kill()
            return
        self._loop.call_soon_threadsafe(self._watch, name, process)

    async def end(self) -> None:
        """Kill them all and wait until they are gone; from now on a death is no failure."""
        self._ending = True
        for sentinel in list(self._watched):
            self._unwatch(sentinel)
        # SIGKILL, as SGLang's own shutdown does: nothing in them outlives them, GPU memory included.
        for _, process in self._processes:
            with contextlib.suppress(ValueError):
                process.kill()
        await asyncio.to_thread(self._reap)

    def died(self, name: str, exit_code: int | None) -> str:
        """How a process ended, in one sentence."""
        left = reports.read(self._report_file)
        if left is not None:
            return f"SGLang's {name} failed: {left}"
        if exit_code is not None and exit_code < 0:
            number = signal.Signals(-exit_code)
            hint = " (most often by the kernel, for want of memory)" if number is signal.SIGKILL else ""
            return f"SGLang's {name} was killed by {number.name}{hint}"
        return f"SGLang's {name} ended with exit status {exit_code}"

    def stopped(self) -> str | None:
        """Which of them is stopped (SIGSTOP, a debugger), in one sentence; None when none is."""
        for name, process in list(self._processes):
            with contextlib.suppress(ValueError, OSError):
                if process_state(process.pid) in STOPPED_STATES:
                    return f"SGLang's {name} is stopped and answers nothing"
        return None

    def _watch(self, name: str, process: BaseProcess) -> None:
        if not self._ending:
            self._watched.add(process.sentinel)
            self._loop.add_reader(process.sentinel, self._ended, name, process)

    def _unwatch(self, sentinel: int) -> None:
        self._watched.discard(sentinel)
        self._loop.remove_reader(sentinel)

    def _ended(self, name: str, process: BaseProcess) -> None:
        self._unwatch(process.sentinel)
        process.join(timeout=0.2)
        self._on_death(self.died(name, process.exitcode))

    def _reap(self) -> None:
        for _, process in self._processes:
            with contextlib.suppress(ValueError):
                process.join(END_TIMEOUT_S)
                process.close()
        self._processes.clear()
        if not self._had_tracker:
            _end_tracker()


def _tracker_runs() -> bool:
    return getattr(multiprocessing.resource_tracker._resource_tracker, "_fd", None) is not None


def _end_tracker() -> None:
    """Multiprocessing starts a process of its own beside the first child, and ends it never."""
    with contextlib.suppress(OSError):
        multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
