"""Files of tenants: uploaded rows, and the results of batches.

Owns what a file is and how many bytes a tenant may keep. A file is there once its description is, which is written
last. Methods block, and run in threads.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.clock import Clock
from tandem.errors import InvalidRequest, ObjectNotFound, Overloaded
from tandem_frontend.batches.directory import DIRECTORY_MODE, FILE_ID, BatchDirectory, read_json, write_json

FILES_MAX = 10_000
"""Of one tenant: each list reads all their descriptions."""
UPLOAD_AGE_MAX_S = 86_400.0
"""An upload that old belongs to a process that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """The description of a file, with OpenAI's names."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"object": "file", **asdict(self), "status": "processed", "status_details": None}


class FileStore:
    """The files in a batch directory."""

    def __init__(self, directory: BatchDirectory, tenant_bytes_max: int, retention_s: float, clock: Clock) -> None:
        """`clock` is the time of day. `retention_s`: after which a file is deleted."""
        self._directory = directory
        self._tenant_bytes_max = tenant_bytes_max
        self._retention_s = retention_s
        self._clock = clock

    def check_room(self, tenant: str, size: int = 0) -> None:
        """Whether a tenant may keep one more file of so many bytes.

        Raises:
            Overloaded: it has too many, or too many bytes.
        """
        files = self.of_tenant(tenant)
        if len(files) >= FILES_MAX:
            raise Overloaded(f"this client keeps {FILES_MAX} files already: delete some", limit="files")
        if sum(file.bytes for file in files) + size > self._tenant_bytes_max:
            raise Overloaded(
                f"the files of this client would exceed {self._tenant_bytes_max} bytes: delete some",
                limit="batch_tenant_bytes_max",
            )

    def add(
        self, tenant: str, data: Path, file_id: str, filename: str, purpose: str, expires_s: float | None = None
    ) -> StoredFile:
        """Keep a file that is complete and on disk; its path is gone then. The same id twice is the same file.

        `expires_s`: seconds after which it is deleted, if that is before the retention ends.
        """
        folder = self._directory.files(tenant)
        folder.mkdir(DIRECTORY_MODE, exist_ok=True)
        now_s = self._clock()
        file = StoredFile(
            id=file_id,
            bytes=data.stat().st_size,
            created_at=int(now_s),
            filename=filename,
            purpose=purpose,
            expires_at=int(now_s + min(expires_s or self._retention_s, self._retention_s)),
        )
        data.replace(folder / f"{file_id}.data")
        write_json(folder / f"{file_id}.json", asdict(file))
        return file

    def get(self, tenant: str, file_id: str, field: str = "file_id") -> StoredFile:
        """A file of a tenant.

        Raises:
            ObjectNotFound: it has none with this id; `field` names the parameter.
        """
        found = None
        if FILE_ID.fullmatch(file_id):
            found = self._read(self._directory.files(tenant) / f"{file_id}.json")
        if found is None:
            raise ObjectNotFound(f"{field}: no such file", field=field)
        return found

    def path(self, tenant: str, file_id: str, field: str = "file_id") -> Path:
        """Where its bytes are. Raises as `get`."""
        return self._directory.files(tenant) / f"{self.get(tenant, file_id, field).id}.data"

    def of_tenant(self, tenant: str) -> list[StoredFile]:
        """Files of a tenant, newest first."""
        found = (self._read(path) for path in self._directory.files(tenant).glob("file-*.json"))
        return sorted(
            (file for file in found if file is not None), key=lambda file: (file.created_at, file.id), reverse=True
        )

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file. A batch that was created of it has its bytes under a second name. Raises as `get`."""
        path = self.path(tenant, file_id)
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete files that have expired, and uploads that no process finishes."""
        for path in self._directory.all_of("files", "file-*.json"):
            if self._read(path) is None:
                path.unlink(missing_ok=True)
                path.with_suffix(".data").unlink(missing_ok=True)
        unfinished = [*self._directory.uploads.iterdir(), *self._directory.all_of("files", "file-*.data")]
        for path in unfinished:
            with contextlib.suppress(FileNotFoundError):
                is_old = self._clock() - path.stat().st_mtime > UPLOAD_AGE_MAX_S
                if is_old and not path.with_suffix(".json").exists():
                    path.unlink()

    def _read(self, path: Path) -> StoredFile | None:
        """None: it is not there, or has expired."""
        value = read_json(path)
        if value is None:
            return None
        file = StoredFile(**value)
        return file if file.expires_at > self._clock() else None


def purpose_of(value: str) -> str:
    """The purpose of an upload.

    Raises:
        InvalidRequest: it is another one.
    """
    if value != "batch":
        raise InvalidRequest("purpose", "must be batch: files serve batches only here")
    return value


def link_or_copy(source: Path, target: Path) -> None:
    """A second name of a file's bytes, which outlasts the first; a copy where the file system has no links.

    Raises:
        FileNotFoundError: the source is gone.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with source.open("rb") as reading, target.open("wb") as writing:
            while piece := reading.read(2**20):
                writing.write(piece)
