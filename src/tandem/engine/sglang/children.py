"""The child processes of one SGLang engine: watched from their start, killed together.

Owns the sentence that reports how one died. A death is noticed at once because the process's sentinel becomes readable;
SGLang's own watchdog polls once a second and then ends the whole worker. A stopped process (SIGSTOP) makes no sentinel
readable, so that state is polled.
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
"""State letters in /proc/PID/stat: stopped by a signal, stopped by a debugger."""


def process_state(pid: int | None) -> str:
    """The process state letter of /proc/PID/stat; "" where the system has no /proc.

    Raises:
        OSError: no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if pid is None or not stat.parent.parent.is_dir():
        return ""
    # The name in parentheses may hold spaces and parentheses: the state follows the last closing one.
    return stat.read_text().rpartition(")")[2].split()[0]


def scheduler_names(count: int) -> list[str]:
    """What the schedulers of one engine are called in sentences, in SGLang's order."""
    return ["scheduler"] if count == 1 else [f"scheduler of rank {rank}" for rank in range(count)]


class Children:
    """Child processes of one engine. Constructed on the event loop; `add` is called on the thread that starts them."""

    def __init__(self, report_file: Path, on_death: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._report_file = report_file
        self._on_death = on_death
        self._processes: list[tuple[str, BaseProcess]] = []
        self._watched: set[int] = set()
        self._ending = False
        self._had_tracker = _tracker_runs()

    def add(self, name: str, process: BaseProcess) -> None:
        """Watch a process that has just been started; kill it at once if `end` was called already."""
        self._processes.append((name, process))
        if self._ending:
            process.kill()
            return
        self._loop.call_soon_threadsafe(self._watch, name, process)

    async def end(self) -> None:
        """Kill all of them and wait for their exit; deaths are no longer reported from now on."""
        self._ending = True
        for sentinel in list(self._watched):
            self._unwatch(sentinel)
        # SIGKILL, like SGLang's own shutdown: everything they hold, GPU memory included, is released with them.
        for _, process in self._processes:
            with contextlib.suppress(ValueError):
                process.kill()
        await asyncio.to_thread(self._reap)

    def died(self, name: str, exit_code: int | None) -> str:
        """How a process ended, in one sentence: its own report if it left one, else its signal or exit status."""
        report = reports.read(self._report_file)
        if report is not None:
            return f"SGLang's {name} failed: {report}"
        if exit_code is not None and exit_code < 0:
            number = signal.Signals(-exit_code)
            hint = " (most often by the kernel's OOM killer: check dmesg)" if number is signal.SIGKILL else ""
            return f"SGLang's {name} was killed by {number.name}{hint}"
        return f"SGLang's {name} exited with status {exit_code}"

    def stopped(self) -> str | None:
        """A sentence that names a stopped child (SIGSTOP, a debugger); None when none is stopped."""
        for name, process in list(self._processes):
            with contextlib.suppress(ValueError, OSError):
                if process_state(process.pid) in STOPPED_STATES:
                    return f"SGLang's {name} is stopped (SIGSTOP or a debugger) and does not respond"
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
    """Stop multiprocessing's resource tracker: it is started with the first child, and nothing else ends it."""
    with contextlib.suppress(OSError):
        multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
