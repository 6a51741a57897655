"""ProcessService: what this process holds now, the same for every service.

Owns the figures only. Who asks compares them with those of a quiet moment: what does not come back leaks.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import tandem
from tandem.api.process.v1 import process_service_pb2 as pb
from tandem.api.process.v1 import process_service_pb2_grpc as pb_grpc
from tandem.rpc.handler_guard import Calls
from tandem.rpc.messages import timestamp

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ProcessService"].full_name
SELF = Path("/proc/self")


class ProcessServicer(pb_grpc.ProcessServiceServicer):
    """The contract of process_service.proto."""

    def __init__(self, calls: Calls) -> None:
        """`calls` counts those that are being answered, the present one among them, and those that failed."""
        self._calls = calls
        self._started_time = timestamp(time.time())

    async def GetFigures(self, request: pb.GetFiguresRequest, context: Any) -> pb.GetFiguresResponse:  # noqa: N802
        """The figures now."""
        return pb.GetFiguresResponse(
            release=tandem.__version__,
            pid=os.getpid(),
            started_time=self._started_time,
            open_calls=self._calls.count - 1,
            tasks=len(asyncio.all_tasks()),
            threads=threading.active_count(),
            descriptors=_descriptors(),
            resident_bytes=_resident_bytes(),
            failed_calls=self._calls.failures,
        )


def _descriptors() -> int | None:
    folder = SELF / "fd"
    # Listing it takes one itself.
    return len(os.listdir(folder)) - 1 if folder.is_dir() else None


def _resident_bytes() -> int | None:
    file = SELF / "statm"
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else None
