"""Packs a folder of packages into pieces of a limited size, and unpacks them.

Each unit (a chunk of a large file, or an archive of small files) is compressed separately, so that a machine can unpack
units in any order, on all cores, while others are still in transfer. Needs `zstandard` on both sides.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 48 * 2**20
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Unit:
    """One thing that is compressed by itself: files from the folder, or a part of one."""

    name: str
    files: tuple[str, ...]
    offset: int | None = None
    """Of a chunk in its file; None: an archive of whole files."""
    size_bytes: int = 0


def plan(files: Iterable[tuple[str, int]], chunk_bytes: int = CHUNK_BYTES) -> list[Unit]:
    """Cut large files into chunks and gather small ones.

    Args:
        files: relative path and size of each.
        chunk_bytes: the most a unit holds before compression.
    """
    units: list[Unit] = []
    gathered: list[str] = []
    gathered_bytes = 0

    def close() -> None:
        nonlocal gathered, gathered_bytes
        if gathered:
            units.append(Unit(f"{len(units):03d}.tar", tuple(gathered), None, gathered_bytes))
        gathered, gathered_bytes = [], 0

    for path, size_bytes in sorted(files):
        if size_bytes > chunk_bytes // 2:
            for offset in range(0, size_bytes, chunk_bytes):
                length = min(chunk_bytes, size_bytes - offset)
                units.append(Unit(f"{len(units):03d}.part", (path,), offset, length))
            continue
        if gathered_bytes + size_bytes > chunk_bytes:
            close()
        gathered.append(path)
        gathered_bytes += size_bytes
    close()
    return units


def gather(sizes: Sequence[tuple[str, int]], limit_bytes: int) -> list[list[str]]:
    """Which units travel together: first fit, the largest first.

    Raises:
        ValueError: one is larger than a piece may be.
    """
    pieces: list[list[str]] = []
    room: list[int] = []
    for name, size_bytes in sorted(sizes, key=lambda unit: (-unit[1], unit[0])):
        if size_bytes > limit_bytes:
            raise ValueError(f"{name} has {size_bytes} bytes, and a piece holds {limit_bytes}")
        fits = next((number for number, free in enumerate(room) if free >= size_bytes), None)
        if fits is None:
            pieces.append([])
            room.append(limit_bytes)
            fits = len(pieces) - 1
        pieces[fits].append(name)
        room[fits] -= size_bytes
    return pieces


def pack(folder: Path, out: Path, limit_bytes: int, workers: int = 2, level: int = 9) -> list[Path]:
    """Write `piece-00`, `piece-01` and so on below `out`; each holds units and their manifest."""
    files = [(str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file()]
    units = plan(files)
    staged = out / "units"
    staged.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        sizes = dict(pool.map(_compress, *zip(*((folder, unit, staged, level) for unit in units), strict=True)))
    by_name = {unit.name: unit for unit in units}
    written = []
    for number, names in enumerate(gather(list(sizes.items()), limit_bytes)):
        piece = out / f"piece-{number:02d}"
        piece.mkdir()
        for name in names:
            (staged / f"{name}.zst").rename(piece / f"{name}.zst")
        (piece / MANIFEST).write_text(json.dumps([asdict(by_name[name]) for name in names]))
        written.append(piece)
    staged.rmdir()
    return written


def _compress(folder: Path, unit: Unit, staged: Path, level: int) -> tuple[str, int]:
    target = staged / f"{unit.name}.zst"
    if unit.offset is None:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for name in unit.files:
                archive.add(folder / name, name, recursive=False)
        data = raw.getvalue()
    else:
        with (folder / unit.files[0]).open("rb") as file:
            file.seek(unit.offset)
            data = file.read(unit.size_bytes)
    target.write_bytes(_zstandard().ZstdCompressor(level=level).compress(data))
    return unit.name, target.stat().st_size


def unpack(piece: Path, folder: Path, workers: int | None = None) -> int:
    """Put the units of one piece below `folder`. Returns how many there were."""
    units = [Unit(**{**unit, "files": tuple(unit["files"])}) for unit in json.loads((piece / MANIFEST).read_text())]
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(_expand, [piece] * len(units), units, [folder] * len(units)))
    return len(units)


def _expand(piece: Path, unit: Unit, folder: Path) -> None:
    data = _zstandard().ZstdDecompressor().decompress((piece / f"{unit.name}.zst").read_bytes())
    if unit.offset is None:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(folder, filter="fully_trusted")
        return
    target = folder / unit.files[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o755)
    try:
        os.pwrite(descriptor, data, unit.offset)
    finally:
        os.close(descriptor)


def _zstandard() -> Any:
    return importlib.import_module("zstandard")


def remove(folder: Path, unwanted: Iterable[str]) -> int:
    """Delete what matches a pattern. Returns how many bytes that were."""
    removed_bytes = 0
    for pattern in unwanted:
        for path in list(folder.glob(pattern)):
            held = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            removed_bytes += sum(p.stat().st_size for p in held)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return removed_bytes
