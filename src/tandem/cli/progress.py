"""Progress display while a cluster starts and stops: one line per process, with the time taken.

A live table on a terminal; elsewhere one line per state change, and a reminder for each long wait.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from tandem.local_cluster.child_process import ClusterProcess, ProcessState

REMIND_INTERVAL_S = 10.0
WAITING = (ProcessState.STARTING, ProcessState.DRAINING)
MARKS = {ProcessState.READY: "[green]✓[/]", ProcessState.ENDED: "[dim]·[/]"}


class Readiness:
    """Displays the states of the processes of a cluster."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin_s: dict[str, float] = {}
        self._took_s: dict[str, float] = {}
        self._seen: dict[str, tuple[ClusterProcess, ProcessState]] = {}
        self._reminder: asyncio.TimerHandle | None = None
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._table, transient=False)

    def __enter__(self) -> Readiness:
        """Start the display."""
        if self._console.is_terminal:
            self._live.start()
        else:
            self._remind_later()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        if self._reminder is not None:
            self._reminder.cancel()

    def changed(self, process: ClusterProcess) -> None:
        """Display the state of a process, if it changed."""
        if self._seen.get(process.name, (None, None))[1] is process.state:
            return
        if process.state in WAITING:
            self._begin_s[process.name] = time.monotonic()
        self._took_s[process.name] = time.monotonic() - self._begin_s.get(process.name, time.monotonic())
        self._seen[process.name] = (process, process.state)
        if not self._console.is_terminal:
            self._console.print(self._line(process), highlight=False, markup=False, soft_wrap=True)

    def _line(self, process: ClusterProcess) -> str:
        parts = [f"{process.name:<14} {process.state.value}"]
        if process.state is ProcessState.READY:
            parts += [process.address, f"pid {process.pid}", f"after {self._took_s[process.name]:.1f} s"]
        return "  ".join(parts)

    def _remind_later(self) -> None:
        self._reminder = asyncio.get_running_loop().call_later(REMIND_INTERVAL_S, self._remind)

    def _remind(self) -> None:
        """Print what is still in progress: loading a model takes long, and silence looks like a hang."""
        waiting = [(name, state) for name, (_, state) in self._seen.items() if state in WAITING]
        for name, state in waiting:
            took_s = time.monotonic() - self._begin_s[name]
            self._console.print(f"{name:<14} still {state.value} after {took_s:.0f} s", highlight=False)
        self._remind_later()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for process, state in self._seen.values():
            waiting = state in WAITING
            took_s = time.monotonic() - self._begin_s[process.name] if waiting else self._took_s[process.name]
            mark = Spinner("dots") if waiting else MARKS[state]
            details = f"{process.address}  [dim]pid {process.pid}[/]" if state is ProcessState.READY else ""
            table.add_row(mark, process.name, state.value, f"[dim]{took_s:5.1f} s[/]", details)
        return table
