"""BatchService: OpenAI's Files and Batch APIs. Every call reads and writes in the directory of its tenant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import batch_service_pb2 as pb
from tandem.api.frontend.v1 import batch_service_pb2_grpc as pb_grpc
from tandem.clock import Clock
from tandem.errors import InvalidRequest, NotSupported, ObjectNotFound
from tandem_frontend.batches.directory import BatchDirectory, new_id
from tandem_frontend.batches.files import FileStore, purpose_of
from tandem_frontend.batches.records import WINDOW_S, Batch
from tandem_frontend.batches.schemas import CreateBatchRequest
from tandem_frontend.batches.store import BatchStore
from tandem_frontend.batches.upload import Upload
from tandem_frontend.call_context import Caller, caller_of
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.response import whole

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["BatchService"].full_name
FILES_PAGE, BATCHES_PAGE, BATCHES_PAGE_MAX = 10_000, 20, 100
CONTENT_TYPE = "application/octet-stream"
READ_BYTES = 32 * 2**10
BODY_BYTES_MAX = 64 * 2**10


class Named(Protocol):
    """What a list holds."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object."""
        ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True, slots=True)
class Stores:
    """Where files and batches are."""

    directory: BatchDirectory
    files: FileStore
    batches: BatchStore
    file_bytes_max: int
    clock: Clock
    """Time of day."""
    on_created: Callable[[], None] = lambda: None
    """Called when there is a new batch."""


class BatchServicer(pb_grpc.BatchServiceServicer):
    """Implements batch_service.proto."""

    def __init__(self, stores: Stores | None) -> None:
        """`stores` is None where the frontend has no batch directory: every call is refused."""
        self._given = stores

    @property
    def _stores(self) -> Stores:
        if self._given is None:
            raise NotSupported("files and batches are off: this frontend has no batch_directory")
        return self._given

    async def CreateFile(self, requests: AsyncIterator[HttpBody], context: Any) -> AsyncIterator[HttpBody]:  # noqa: N802
        """Keep a file. It is on disk when the call returns."""
        stores, tenant = self._stores, caller_of(context).tenant
        await asyncio.to_thread(stores.files.check_room, tenant)
        upload = Upload(stores.directory.uploads, stores.file_bytes_max)
        try:
            await upload.receive(requests)
            file = await asyncio.to_thread(self._keep, tenant, upload)
        finally:
            await asyncio.to_thread(upload.path.unlink, missing_ok=True)
        yield whole(file)

    def _keep(self, tenant: str, upload: Upload) -> dict[str, Any]:
        purpose, expires_s = purpose_of(upload.purpose), upload.expires_s
        self._stores.files.check_room(tenant, upload.path.stat().st_size)
        file = self._stores.files.add(tenant, upload.path, new_id("file-"), upload.filename, purpose, expires_s)
        return file.as_json()

    async def ListFiles(self, request: pb.BatchServiceListFilesRequest, context: Any) -> HttpBody:  # noqa: N802
        """One page of the tenant's files."""
        order = request.order if request.HasField("order") else "desc"
        if order not in ("asc", "desc"):
            raise InvalidRequest("order", "must be asc or desc")
        files = await asyncio.to_thread(self._stores.files.of_tenant, caller_of(context).tenant)
        if request.HasField("purpose"):
            files = [file for file in files if file.purpose == request.purpose]
        limit = request.limit if request.HasField("limit") else FILES_PAGE
        return _page(files[:: 1 if order == "desc" else -1], request.after, limit, FILES_PAGE)

    async def GetFile(self, request: pb.BatchServiceGetFileRequest, context: Any) -> HttpBody:  # noqa: N802
        """The description of a file."""
        file = await asyncio.to_thread(self._stores.files.get, caller_of(context).tenant, request.file_id)
        return whole(file.as_json())

    async def GetFileContent(  # noqa: N802
        self, request: pb.BatchServiceGetFileContentRequest, context: Any
    ) -> AsyncIterator[HttpBody]:
        """The bytes of a file, no faster than the client reads them."""
        path = await asyncio.to_thread(self._stores.files.path, caller_of(context).tenant, request.file_id)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            raise ObjectNotFound("file_id: no such file", field="file_id") from None
        with file:
            async for data in _pieces(file):
                yield HttpBody(content_type=CONTENT_TYPE, data=data)

    async def DeleteFile(self, request: pb.BatchServiceDeleteFileRequest, context: Any) -> HttpBody:  # noqa: N802
        """Delete a file."""
        await asyncio.to_thread(self._stores.files.delete, caller_of(context).tenant, request.file_id)
        return whole({"id": request.file_id, "object": "file", "deleted": True})

    async def CreateBatch(self, request: HttpBody, context: Any) -> HttpBody:  # noqa: N802
        """Create a batch. Its input is checked afterwards."""
        stores, caller = self._stores, caller_of(context)
        if len(request.data) > BODY_BYTES_MAX:
            raise InvalidRequest("body", f"must be at most {BODY_BYTES_MAX} bytes long")
        batch = _batch(parse(CreateBatchRequest, request.data), caller, stores.clock())
        await asyncio.to_thread(stores.batches.add, batch)
        stores.on_created()
        return whole(batch.as_json())

    async def ListBatches(self, request: pb.BatchServiceListBatchesRequest, context: Any) -> HttpBody:  # noqa: N802
        """One page of the tenant's batches."""
        batches = await asyncio.to_thread(self._stores.batches.of_tenant, caller_of(context).tenant)
        limit = request.limit if request.HasField("limit") else BATCHES_PAGE
        return _page(batches, request.after, limit, BATCHES_PAGE_MAX)

    async def GetBatch(self, request: pb.BatchServiceGetBatchRequest, context: Any) -> HttpBody:  # noqa: N802
        """One batch."""
        batch = await asyncio.to_thread(self._stores.batches.get, caller_of(context).tenant, request.batch_id)
        return whole(batch.as_json())

    async def CancelBatch(self, request: pb.BatchServiceCancelBatchRequest, context: Any) -> HttpBody:  # noqa: N802
        """Cancel a batch. Its files are there when its status is `cancelled`."""
        batch = await asyncio.to_thread(self._stores.batches.cancel, caller_of(context).tenant, request.batch_id)
        return whole(batch.as_json())


def _batch(body: CreateBatchRequest, caller: Caller, now_s: float) -> Batch:
    expires = body.output_expires_after
    return Batch(
        id=new_id("batch_"),
        tenant=caller.tenant,
        quota=caller.quota,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        created_at=int(now_s),
        expires_at=int(now_s) + WINDOW_S,
        metadata=body.metadata,
        output_expires_s=None if expires is None else float(expires.seconds),
    )


def _page(found: Sequence[N], after: str, limit: int, limit_max: int) -> HttpBody:
    """OpenAI's list object of the `limit` entries behind the one with the id `after`; empty: from the first on."""
    if not 1 <= limit <= limit_max:
        raise InvalidRequest("limit", f"must be 1 to {limit_max}")
    begin = 0
    if after:
        begin = next((number for number, one in enumerate(found, 1) if one.id == after), -1)
        if begin < 0:
            raise InvalidRequest("after", "is none of the ids of this list")
    page = found[begin : begin + limit]
    return whole(
        {
            "object": "list",
            "data": [one.as_json() for one in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": begin + limit < len(found),
        }
    )


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    """The content of a file, at least one piece."""
    data = await asyncio.to_thread(file.read, READ_BYTES)
    yield data
    while data := await asyncio.to_thread(file.read, READ_BYTES):
        yield data
