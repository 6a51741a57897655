"""The batch directory: where everything is, and how it is written so that a killed process leaves nothing half done.

    files/TENANT/FILE_ID.json, .data       a file: its description, which is written last, and its bytes
    batches/TENANT/BATCH_ID/batch.json     a batch: its description
                            input          its rows, a second name of the input file
                            cancel         there once it was cancelled; holds when
                            journal-*      results of rows, one file for each process that has run it
    uploads/                               files that are arriving
    runner.lock                            locked by the one process that runs batches

Owns paths, atomic writes and the lock. A tenant's name never becomes a path: its digest does.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tandem.errors import ConfigError

T = TypeVar("T")

FILE_ID, BATCH_ID = re.compile(r"file-[0-9a-f]{32}"), re.compile(r"batch_[0-9a-f]{32}")
DIRECTORY_MODE = 0o700
SLICE_S, REST_S = 0.001, 0.002
"""A thread works so long and then rests: it holds the interpreter's lock, and the next tokens wait for it."""


class BatchDirectory:
    """Paths of one batch directory. Its methods block, and run in threads."""

    def __init__(self, root: Path) -> None:
        """Create the directory where it is missing.

        Raises:
            ConfigError: it cannot be written; names the setting `batch_directory`.
        """
        self.root = root
        try:
            for name in ("files", "batches", "uploads"):
                (root / name).mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            probe = root / "uploads" / f"probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as problem:
            raise ConfigError("batch_directory", f"{root} cannot be written: {problem.strerror}") from None

    @property
    def uploads(self) -> Path:
        """Files that are arriving. On the same file system as all others, so that they can be renamed."""
        return self.root / "uploads"

    def files(self, tenant: str) -> Path:
        """Files of a tenant; may not exist."""
        return self.root / "files" / tenant_key(tenant)

    def batches(self, tenant: str) -> Path:
        """Batches of a tenant; may not exist."""
        return self.root / "batches" / tenant_key(tenant)

    def all_of(self, kind: str, pattern: str) -> list[Path]:
        """What matches in the directories of all tenants. `kind`: files or batches."""
        return sorted((self.root / kind).glob(f"*/{pattern}"))

    def lock(self) -> DirectoryLock | None:
        """Become the process that runs batches; None: another one is. The kernel gives it up when this process ends."""
        file = (self.root / "runner.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            file.close()
            if isinstance(problem, BlockingIOError):
                return None
            raise
        return DirectoryLock(file)


class DirectoryLock:
    """The right to run batches, until it is released, forgotten, or this process ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def release(self) -> None:
        """Let another process have it."""
        self._file.close()


def tenant_key(tenant: str) -> str:
    """The name of a tenant's directories."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def new_id(prefix: str) -> str:
    """A new id of a file or a batch; ids of one millisecond and later ones are greater."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:20]}"


def write_json(path: Path, value: dict[str, Any], *, is_durable: bool = True) -> None:
    """Replace a file at once: readers see the old or the new content. `is_durable`: also after a loss of power."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        if is_durable:
            file.flush()
            os.fsync(file.fileno())
    part.replace(path)
    if is_durable:
        sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None: there is none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return value


def sync_directory(path: Path) -> None:
    """Make names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def in_thread(work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Run what blocks in a thread. A cancellation counts after its end: a thread goes on, and must not write any more
    when another process has the lock.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **options))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def gently(items: Iterable[T]) -> Iterator[T]:
    """The items, with a rest after each millisecond of work: for threads beside an event loop."""
    begin_s = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - begin_s > SLICE_S:
            time.sleep(REST_S)
            begin_s = time.monotonic()
