"""Results of rows as they come, and the files that become of them.

Each process that runs a batch appends to a journal of its own, so that none ever writes behind the torn end of another
one's. A line is `number kind checksum result`. The first result of a row counts, of any process: so each row is once
in the files, even if two processes have run it, or believed that they may.

A line is not flushed to disk by itself: a killed process loses nothing that it has written, and after a loss of power
the rows of torn and missing lines run again. The files are flushed before the batch says that they are there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tandem_frontend.batches.directory import gently, new_id

OUTPUT, ERROR = b"output", b"error"


class Journal:
    """Where one process writes results."""

    def __init__(self, folder: Path) -> None:
        """Begin a journal; blocks."""
        self._file = (folder / new_id("journal-")).open("ab", buffering=0)

    def append(self, number: int, text: bytes, *, is_error: bool) -> None:
        """Write the result of a row, one line of JSON. Blocks for as long as the page cache does.

        Raises:
            OSError: it could not be written as a whole.
        """
        kind = ERROR if is_error else OUTPUT
        line = b"%d %s %08x %s\n" % (number, kind, zlib.crc32(text), text)
        written = self._file.write(line)
        if written != len(line):
            # The rest of the file would be behind half a line.
            raise OSError(f"{self._file.name}: only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the result of a row is."""

    path: Path
    offset: int
    """Of the text."""
    size: int
    is_error: bool


def read_entries(folder: Path, count: int) -> list[Entry | None]:
    """The first result of each of `count` rows, over all journals; None: it has none. Blocks."""
    entries: list[Entry | None] = [None] * count
    for path in sorted(folder.glob("journal-*")):
        with path.open("rb") as file:
            for number, entry in gently(_entries_of(path, file)):
                if number < count and entries[number] is None:
                    entries[number] = entry
    return entries


def write_results(entries: list[Entry | None], target: Path, *, errors: bool) -> int:
    """Write the results of one kind into a file, in the order of the rows, and flush it. Returns how many. Blocks."""
    count = 0
    files: dict[Path, BinaryIO] = {}
    try:
        with target.open("wb") as out:
            for entry in gently(entries):
                if entry is None or entry.is_error != errors:
                    continue
                if entry.path not in files:
                    files[entry.path] = entry.path.open("rb")
                files[entry.path].seek(entry.offset)
                out.write(files[entry.path].read(entry.size) + b"\n")
                count += 1
            out.flush()
            os.fsync(out.fileno())
    finally:
        for file in files.values():
            file.close()
    return count


def _entries_of(path: Path, file: BinaryIO) -> Iterator[tuple[int, Entry]]:
    """Number and entry of each whole line; others are left out."""
    offset = 0
    for line in file:
        begin, offset = offset, offset + len(line)
        parts = line.split(b" ", 3)
        if len(parts) != 4 or not line.endswith(b"\n") or not parts[0].isdigit() or parts[1] not in (OUTPUT, ERROR):
            continue
        text = parts[3][:-1]
        if b"%08x" % zlib.crc32(text) == parts[2]:
            yield int(parts[0]), Entry(path, begin + len(line) - len(parts[3]), len(text), parts[1] == ERROR)
