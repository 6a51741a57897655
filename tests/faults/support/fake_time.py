"""Processes whose time of day a test can set while they run, by libfaketime; their monotonic clocks are left alone.

Owns where the library comes from (this machine's, else Debian's unpacked into .cache, as Consul is) and the files from
which each process reads its time. What shows the new time is the test's business: it proves that the clock has jumped.
"""

from __future__ import annotations

import os
from pathlib import Path

from tandem.local_cluster import debian_package

PACKAGE, SUITE = "libfaketime", "bookworm"
NAME = "libfaketimeMT.so.1"
CACHE = Path(__file__).parents[3].resolve() / ".cache" / PACKAGE
SYSTEM = Path("/usr/lib")


def find_library() -> Path:
    """The library; fetched when there is none.

    Raises:
        StartError: it cannot be had; says why.
    """
    found = _inside(SYSTEM) or _inside(CACHE / "usr" / "lib")
    if found is None:
        print(f"no {NAME} on this machine: fetching Debian's into {CACHE}, once")
        debian_package.unpack(PACKAGE, SUITE, CACHE)
        found = _inside(CACHE / "usr" / "lib")
        assert found is not None, f"Debian's {PACKAGE} has no {NAME}"
    return found


def _inside(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob(f"*/faketime/{NAME}"))), None)


class FakeTime:
    """The time of day of one process and its successors."""

    def __init__(self, library: Path, file: Path) -> None:
        """`file` is where the process reads it; made here."""
        self._library = library
        self._file = file
        self.jump(0)

    @property
    def environment(self) -> dict[str, str]:
        """What the process must be started with."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Debian's 0.9.10 and its successors know one name each.
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """Set it so many seconds from the true time, at once."""
        draft = self._file.with_suffix(".draft")
        draft.write_text(f"{seconds:+d}\n")
        os.replace(draft, self._file)
