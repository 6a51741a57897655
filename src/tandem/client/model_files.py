"""Copies the files that a frontend needs of a model from one of its workers: configuration and tokenizer.

Owns the bounds of the copy. Whether the files are the right ones, the caller checks by their digest.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Literal

import grpc

from tandem.api.worker.v1 import worker_service_pb2 as pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.domain.checkpoint import FRONTEND_FILES
from tandem.domain.worker import Worker
from tandem.errors import NotSupported, ServiceError
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_rpc_error

log = logging.getLogger(__name__)

TIMEOUT_S = 20.0
BYTES_MAX = 256 * 2**20
"""Of all files together; the largest tokenizers have 30 MB."""


async def copy_model_files(
    channels: Channels, worker: Worker, directory: Path, timeout_s: float = TIMEOUT_S, bytes_max: int = BYTES_MAX
) -> None:
    """Write the files of a worker's model into a directory that exists.

    Raises:
        NotSupported: the worker's release does not send them.
        ServiceError: the worker cannot be reached, took over `timeout_s` seconds, or sent something else, or more
            than `bytes_max`. Names the worker, and no address: clients may read it in the list of models.
    """
    stub: Any = WorkerServiceStub(channels.get(worker.address))
    call = stub.ReadModelFiles(pb.ReadModelFilesRequest(), timeout=timeout_s)
    left_bytes, written = bytes_max, set[str]()
    try:
        while (part := await call.read()) is not grpc.aio.EOF:
            left_bytes -= len(part.data)
            # A name from another process must never become a path.
            if part.name not in FRONTEND_FILES:
                raise ServiceError(
                    f"worker {worker.worker_id} sent {part.name[:64]!r}, which is no file of a tokenizer"
                )
            if left_bytes < 0:
                raise ServiceError(f"worker {worker.worker_id} sent files of over {bytes_max} bytes")
            # The first part replaces what a copy that failed has left.
            await asyncio.to_thread(_write, directory / part.name, part.data, "ab" if part.name in written else "wb")
            written.add(part.name)
    except grpc.aio.AioRpcError as failure:
        error = from_rpc_error(failure)
        log.warning("could not read the files of the model of worker %s: %s", worker.worker_id, error)
        if isinstance(error, NotSupported):
            raise NotSupported(f"worker {worker.worker_id} does not send the files of its model") from None
        raise ServiceError(f"worker {worker.worker_id} did not send the files of its model: {error.reason}") from None
    finally:
        call.cancel()


def _write(file: Path, data: bytes, mode: Literal["ab", "wb"]) -> None:
    with file.open(mode) as stream:
        stream.write(data)
