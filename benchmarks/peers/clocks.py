"""CPU time and memory of processes, and the CPU time of the rest of the machine.

Reads the kernel's exact counters, never samples. `measurements.py` decides whether a window is valid.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


def tree(pids: Iterable[int]) -> list[int]:
    """These processes and all their descendants that live now."""
    found: dict[int, None] = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found[pid] = None
            found |= {child.pid: None for child in process.children(recursive=True)}
    return list(found)


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have taken since their starts, all threads, ended ones included."""
    total_s = 0.0
    for pid in pids:
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            total_s += _process_clock_s(pid)
    return total_s


def _process_clock_s(pid: int) -> float:
    """One process's CPU clock. Linux numbers the clocks of other processes so (see clock_getcpuclockid(3))."""
    if sys.platform == "linux":
        return time.clock_gettime((~pid << 3) | 2)
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def rss_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_info().rss
    return total


def machine_busy_s() -> float:
    """CPU seconds that the whole machine has worked, all cores."""
    times = psutil.cpu_times()
    fields = ("user", "nice", "system", "irq", "softirq")
    return sum(getattr(times, name, 0.0) for name in fields)


def machine_stolen_s() -> float:
    """CPU seconds that the host gave to others."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


@dataclass(frozen=True)
class Parts:
    """Which processes are which, by the roots of their trees."""

    front: list[int]
    proxy: list[int]
    workers: list[int]


@dataclass(frozen=True)
class Snapshot:
    """All clocks at one moment."""

    at_s: float
    front_s: float
    proxy_s: float
    workers_s: float
    own_s: float
    """Of everything this benchmark has started, and itself."""
    machine_s: float
    stolen_s: float
    front_rss_bytes: int
    proxy_rss_bytes: int


def look(parts: Parts) -> Snapshot:
    """Read everything now."""
    front, proxy = tree(parts.front), tree(parts.proxy)
    return Snapshot(
        at_s=time.monotonic(),
        front_s=cpu_s(front),
        proxy_s=cpu_s(proxy),
        workers_s=cpu_s(tree(parts.workers)),
        own_s=cpu_s(tree([os.getpid()])),
        machine_s=machine_busy_s(),
        stolen_s=machine_stolen_s(),
        front_rss_bytes=rss_bytes(front),
        proxy_rss_bytes=rss_bytes(proxy),
    )


@dataclass(frozen=True)
class Spent:
    """What lies between two snapshots."""

    seconds: float
    front_s: float
    proxy_s: float
    workers_s: float
    others_cores: float
    """Cores that processes outside of this benchmark kept busy."""
    stolen_cores: float

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot) -> Spent:
        """The difference."""
        seconds = after.at_s - before.at_s
        others_s = (after.machine_s - before.machine_s) - (after.own_s - before.own_s)
        return cls(
            seconds=seconds,
            front_s=after.front_s - before.front_s,
            proxy_s=after.proxy_s - before.proxy_s,
            workers_s=after.workers_s - before.workers_s,
            others_cores=max(0.0, others_s / seconds),
            stolen_cores=max(0.0, (after.stolen_s - before.stolen_s) / seconds),
        )
