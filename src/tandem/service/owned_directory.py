"""A process's directory for temporary files, and the files outside of it that go with it.

A killed process removes nothing. Its directory says which process it belonged to by a lock, which the kernel releases,
and lists the files elsewhere (in shared memory). The next process with such a directory, or the parent of the cluster,
removes both. Process ids would not do: containers that share /dev/shm have their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from tandem.service import run_directory

OWNER = "owner"
OUTSIDE = "outside"


class OwnedDirectory:
    """The directory of this process; removed by `remove`, or by another process after this one's death."""

    def __init__(self, prefix: str) -> None:
        """Create it beside those of others with this prefix; those of dead processes are removed."""
        self.path = run_directory.make_inside(prefix)
        sweep(self.path.parent, prefix)
        # Locked before it has its name: a sweep must not see it unlocked.
        unnamed = self.path / f".{OWNER}"
        self._lock = unnamed.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / OWNER)

    def note_outside(self, file: Path) -> None:
        """List a file elsewhere, before it exists."""
        with (self.path / OUTSIDE).open("a", encoding="utf-8") as listed:
            listed.write(f"{file}\n")

    def remove(self) -> None:
        """Remove it and the listed files. May be called twice."""
        _remove(self.path)
        self._lock.close()


def sweep(parent: Path, prefix: str = "") -> None:
    """Remove the directories of dead processes below `parent`, with the files that they list."""
    for owner in parent.glob(f"{prefix}*/{OWNER}"):
        # Another process may remove it at the same time; a directory of another user cannot be opened.
        with contextlib.suppress(OSError), owner.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_of(lock.fileno(), owner):
                _remove(owner.parent)


def _is_of(descriptor: int, file: Path) -> bool:
    """Whether a file still is the one that was opened, and this user's."""
    opened, found = os.fstat(descriptor), file.stat()
    return opened.st_ino == found.st_ino and found.st_uid == os.geteuid()


def _remove(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / OUTSIDE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(OSError):
                Path(line).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
