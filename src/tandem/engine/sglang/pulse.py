"""What each scheduler process publishes of its hand-over port: a heartbeat, and counts of dropped messages.

A small file for each process, in the engine's directory and mapped into memory: a write costs no system call, and the
worker reads it without waiting for the process.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from tandem.domain.handover import DropReason

PREFIX = "handover-"
REASONS = tuple(DropReason)
_LAYOUT = struct.Struct(f"={1 + len(REASONS)}Q")
"""Nanoseconds of the system's monotonic clock at the last beat, then the count of each reason. One writer."""


class PulseWriter:
    """Written by the thread that receives the hand-over's messages, and by no other."""

    def __init__(self, directory: Path, pid: int) -> None:
        """Create the file of process `pid`; it begins with a beat."""
        self._counts = dict.fromkeys(REASONS, 0)
        # Complete before the worker can find it: an empty file cannot be mapped, and one of zeros would look dead.
        draft = directory / f".{PREFIX}{pid}"
        draft.write_bytes(_LAYOUT.pack(time.monotonic_ns(), *self._counts.values()))
        with draft.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        draft.rename(directory / f"{PREFIX}{pid}")

    def beat(self) -> None:
        """The thread is alive and waits for the next message."""
        struct.pack_into("=Q", self._map, 0, time.monotonic_ns())

    def drop(self, reason: DropReason) -> None:
        """Count a dropped message."""
        self._counts[reason] += 1
        _LAYOUT.pack_into(self._map, 0, time.monotonic_ns(), *self._counts.values())


@dataclass(slots=True)
class Pulse:
    """Of all scheduler processes of one engine."""

    silent_s: float = 0.0
    """Time since the last beat of the process that has been silent for longest; 0 without such a process."""
    dropped: dict[DropReason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))


def read(directory: Path) -> Pulse:
    """The pulse that the engine in this directory publishes; an empty one where it has no hand-over port."""
    pulse = Pulse()
    for file in directory.glob(f"{PREFIX}*"):
        try:
            beat_ns, *counts = _LAYOUT.unpack(file.read_bytes())
        except (OSError, struct.error):
            # The engine is being stopped and its directory removed.
            continue
        pulse.silent_s = max(pulse.silent_s, (time.monotonic_ns() - beat_ns) / 1e9)
        for reason, count in zip(REASONS, counts, strict=True):
            pulse.dropped[reason] += count
    return pulse
