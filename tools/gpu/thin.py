"""Removes the code of other GPU architectures from a CUDA library, so that it compresses well.

Zeroes bytes in place: the file keeps its length, symbols and layout, and zeroed ranges compress to almost nothing. The
resulting library works on one architecture only, and fails at the first use of a removed kernel.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0xBA55ED50
ZSTD_MAGIC = bytes.fromhex("28b52ffd")
CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, size of this header, size of what follows."""
ENTRY = struct.Struct("<HHIQ")
"""Kind, version, size of the entry's header, size of its payload."""
ARCHITECTURE_AT = 28
ENTRY_HEADER_MIN_BYTES = 64
SECTIONS = (".nv_fatbin", "__nv_relfatbin")


@dataclass(frozen=True, slots=True)
class Entry:
    """Code for one architecture: where its payload is, and which architecture it is for."""

    begin: int
    size_bytes: int
    architecture: int


def entries(data: bytes | bytearray | memoryview) -> Iterator[Entry]:
    """All entries of a fat binary section, whatever lies between its containers."""
    place = 0
    while place + CONTAINER.size <= len(data):
        magic, _, header_bytes, body_bytes = CONTAINER.unpack_from(data, place)
        if magic != MAGIC:
            place += 8
            continue
        entry, end = place + header_bytes, min(place + header_bytes + body_bytes, len(data))
        while entry + ENTRY_HEADER_MIN_BYTES <= end:
            _, _, entry_header_bytes, payload_bytes = ENTRY.unpack_from(data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + ARCHITECTURE_AT)
            yield Entry(entry + entry_header_bytes, payload_bytes, architecture)
            entry += entry_header_bytes + payload_bytes
        place = end


def thin(section: bytearray, architecture: int, wanted: Callable[[bytes], bool] = lambda code: True) -> int:
    """Zero every entry that is for another architecture, or whose code is not wanted.

    Returns:
        How many bytes were zeroed.
    """
    zeroed_bytes = 0
    for entry in list(entries(section)):
        payload = bytes(section[entry.begin : entry.begin + entry.size_bytes])
        if entry.architecture == architecture and wanted(readable(payload)):
            continue
        section[entry.begin : entry.begin + len(payload)] = bytes(len(payload))
        zeroed_bytes += len(payload)
    return zeroed_bytes


def readable(payload: bytes) -> bytes:
    """An entry's code as the compiler made it, so that the names of its kernels can be found in it."""
    if not payload.startswith(ZSTD_MAGIC):
        return payload
    return subprocess.run(["zstd", "-dc"], input=payload, capture_output=True, check=False).stdout


def thin_file(path: Path, architecture: int, wanted: Callable[[bytes], bool] = lambda code: True) -> int:
    """The same for a library; 0 for one without code for GPUs."""
    zeroed_bytes = 0
    with path.open("r+b") as file:
        for begin, size_bytes in sections_of(path):
            file.seek(begin)
            section = bytearray(file.read(size_bytes))
            zeroed_bytes += thin(section, architecture, wanted)
            file.seek(begin)
            file.write(section)
    return zeroed_bytes


def sections_of(path: Path) -> list[tuple[int, int]]:
    """Where in the file the code for GPUs is, and how long it is."""
    table = subprocess.run(["readelf", "-SW", str(path)], capture_output=True, text=True, check=True).stdout
    names = "|".join(re.escape(name) for name in SECTIONS)
    found = re.findall(rf"(?:{names})\s+\S+\s+\S+\s+([0-9a-f]+)\s+([0-9a-f]+)", table)
    return [(int(begin, 16), int(size, 16)) for begin, size in found]


def attention_wanted(code: bytes) -> bool:
    """Of FlashAttention 3's kernels: bfloat16 with heads of 64 and 128, and what is no attention by itself."""
    found = re.search(rb"CollectiveMainloopFwdSm\d+\w*?EEELi(\d+)EN(?:S_|7cutlass)\d+(\w+?)_tE", code)
    if found is None:
        return True
    return found[1] in (b"64", b"128") and found[2] == b"bfloat16"
