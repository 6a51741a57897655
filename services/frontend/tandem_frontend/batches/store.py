"""Batches in their directory: created and cancelled by any frontend, changed by the one process that runs them.

Owns the rule by which no lock is needed for a description: after its creation only the runner writes it. What others
want of a batch is a file beside it. Methods block, and run in threads.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from tandem.clock import Clock
from tandem.errors import InvalidRequest, ObjectNotFound, Overloaded
from tandem_frontend.batches.directory import (
    BATCH_ID,
    DIRECTORY_MODE,
    BatchDirectory,
    read_json,
    sync_directory,
    write_json,
)
from tandem_frontend.batches.files import FileStore, link_or_copy
from tandem_frontend.batches.records import Batch

UNFINISHED_MAX = 100
"""Batches of one tenant that have not ended."""
BATCHES_MAX = 10_000
"""Of one tenant: each list reads all their descriptions."""


class BatchStore:
    """The batches in a batch directory."""

    def __init__(self, directory: BatchDirectory, files: FileStore, retention_s: float, clock: Clock) -> None:
        """`clock` is the time of day. `retention_s`: after its end a batch is forgotten."""
        self._directory = directory
        self._files = files
        self._retention_s = retention_s
        self._clock = clock

    def folder(self, batch: Batch) -> Path:
        """Where its rows and results are."""
        return self._directory.batches(batch.tenant) / batch.id

    def add(self, batch: Batch) -> None:
        """Keep a new batch; its input file may be deleted then.

        Raises:
            ObjectNotFound: the tenant has no such input file.
            Overloaded: the tenant has too many batches.
        """
        source = self._files.path(batch.tenant, batch.input_file_id, "input_file_id")
        others = self.of_tenant(batch.tenant)
        if sum(not other.has_ended for other in others) >= UNFINISHED_MAX or len(others) >= BATCHES_MAX:
            raise Overloaded(
                f"this client has {UNFINISHED_MAX} batches that have not ended, or {BATCHES_MAX} in all",
                limit="batches",
            )
        folder = self.folder(batch)
        folder.mkdir(DIRECTORY_MODE, parents=True)
        try:
            link_or_copy(source, folder / "input")
        except FileNotFoundError:
            folder.rmdir()
            raise ObjectNotFound("input_file_id: no such file", field="input_file_id") from None
        # Last, because a batch is there once its description is.
        write_json(folder / "batch.json", batch.stored())
        sync_directory(folder.parent)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """A batch of a tenant.

        Raises:
            ObjectNotFound: it has none with this id.
        """
        found = None
        if BATCH_ID.fullmatch(batch_id):
            found = self._read(self._directory.batches(tenant) / batch_id)
        if found is None:
            raise ObjectNotFound("batch_id: no such batch", field="batch_id")
        return found

    def of_tenant(self, tenant: str) -> list[Batch]:
        """Batches of a tenant, newest first."""
        found = (self._read(path) for path in self._directory.batches(tenant).glob("batch_*"))
        return sorted(
            (batch for batch in found if batch is not None),
            key=lambda batch: (batch.created_at, batch.id),
            reverse=True,
        )

    def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Ask the runner to end a batch. Twice is once.

        Raises:
            ObjectNotFound: the tenant has no such batch.
            InvalidRequest: it has ended.
        """
        batch = self.get(tenant, batch_id)
        if batch.has_ended:
            raise InvalidRequest("batch_id", f"is {batch.status}: only a batch that has not ended can be cancelled")
        mark = self.folder(batch) / "cancel"
        if read_json(mark) is None:
            write_json(mark, {"time": int(self._clock())})
        return self.get(tenant, batch_id)

    def write(self, batch: Batch, *, is_durable: bool = True) -> None:
        """Replace a description. Only the runner may."""
        write_json(self.folder(batch) / "batch.json", batch.stored(), is_durable=is_durable)

    def unfinished(self) -> list[Batch]:
        """Batches of all tenants that have not ended, oldest first."""
        found = (self._read(path) for path in self._directory.all_of("batches", "batch_*"))
        return sorted(
            (batch for batch in found if batch is not None and not batch.has_ended),
            key=lambda batch: (batch.created_at, batch.id),
        )

    def clear(self, batch: Batch) -> None:
        """Delete what only running it needs."""
        for path in self.folder(batch).iterdir():
            if path.name not in ("batch.json", "cancel"):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete batches that ended long ago, those whose creation was cut off, and the rows of ended ones."""
        now_s = self._clock()
        for path in self._directory.all_of("batches", "batch_*"):
            batch = self._read(path)
            if batch is None:
                with contextlib.suppress(FileNotFoundError):
                    is_old = now_s - path.stat().st_mtime > self._retention_s
            else:
                is_old = batch.has_ended and now_s - batch.expires_at > self._retention_s
                if batch.has_ended:
                    self.clear(batch)
            if is_old:
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, folder: Path) -> Batch | None:
        value = read_json(folder / "batch.json")
        if value is None:
            return None
        mark = read_json(folder / "cancel")
        return Batch.read(value, None if mark is None else mark["time"])
