"""ProcessService: the resources that this process holds now, the same for every service.

For finding leaks: values that do not return to those of an idle process leak.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import tandem
from tandem.api.process.v1 import process_service_pb2 as pb
from tandem.api.process.v1 import process_service_pb2_grpc as pb_grpc
from tandem.rpc.convert import timestamp
from tandem.rpc.handler_guard import Calls

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ProcessService"].full_name
SELF = Path("/proc/self")


class ProcessServicer(pb_grpc.ProcessServiceServicer):
    """The contract of process_service.proto."""

    def __init__(self, calls: Calls) -> None:
        """`calls` counts the open calls, this one included, and the failed ones."""
        self._calls = calls
        self._started_s = time.time()
        self.others: Callable[[], Awaitable[Sequence[pb.GetFiguresResponse]]] | None = None
        """Returns the values of the other processes of this service, to be added to this one's; the first is that of
        the process that represents the service."""

    async def GetFigures(self, request: pb.GetFiguresRequest, context: Any) -> pb.GetFiguresResponse:  # noqa: N802
        """The current values, of all processes of the service."""
        own = self.own()
        own.open_calls -= 1
        return own if self.others is None else _added([*await self.others(), own])

    def own(self) -> pb.GetFiguresResponse:
        """The values of this process alone."""
        figures = held_now(self._started_s)
        figures.open_calls = self._calls.count
        figures.failed_calls.update(self._calls.failures)
        return figures


def held_now(started_s: float) -> pb.GetFiguresResponse:
    """The resources of this process, without its calls."""
    return pb.GetFiguresResponse(
        release=tandem.__version__,
        pid=os.getpid(),
        started_time=timestamp(started_s),
        tasks=len(asyncio.all_tasks()),
        threads=threading.active_count(),
        descriptors=_descriptors(),
        resident_bytes=_resident_bytes(),
    )


def _added(figures: Sequence[pb.GetFiguresResponse]) -> pb.GetFiguresResponse:
    """The sum over several processes, with release, pid and start time of the first."""
    total = pb.GetFiguresResponse()
    total.CopyFrom(figures[0])
    for more in figures[1:]:
        total.open_calls += more.open_calls
        total.tasks += more.tasks
        total.threads += more.threads
        if more.HasField("descriptors"):
            total.descriptors += more.descriptors
        if more.HasField("resident_bytes"):
            total.resident_bytes += more.resident_bytes
        for reason, count in more.failed_calls.items():
            total.failed_calls[reason] += count
    return total


def _descriptors() -> int | None:
    folder = SELF / "fd"
    # Without the descriptor of the listing itself.
    return len(os.listdir(folder)) - 1 if folder.is_dir() else None


def _resident_bytes() -> int | None:
    file = SELF / "statm"
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.is_file() else None
