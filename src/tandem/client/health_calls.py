"""Health of a peer over grpc.health.v1: a watch stream that sends changes only, and a single check.

Uses existing channels; the caller decides what follows from a status or a failure.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import ServiceError
from tandem.rpc.status import from_rpc_error

SERVING = health_pb2.HealthCheckResponse.SERVING


class HealthWatch:
    """Watch stream of the overall health of a process. Must be closed."""

    def __init__(self, channel: grpc.aio.Channel, *, waits: bool) -> None:
        """Starts the call. `waits`: wait for the connection without limit, instead of failing when unreachable."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=waits)

    async def read(self) -> bool:
        """Whether the process is serving: first the current status, then each change.

        Raises:
            TandemError: the stream ended, for example because the process died.
        """
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        except asyncio.CancelledError:
            if _is_being_cancelled():
                raise
            raise ServiceError("the channel was closed") from None
        if response is grpc.aio.EOF:
            raise ServiceError("the health stream ended")
        return bool(response.status == SERVING)

    def close(self) -> None:
        """Cancel the stream."""
        self._call.cancel()


def _is_being_cancelled() -> bool:
    """Whether the current task is to end. Not inline: a cancelled task keeps its exception, whose frames must not refer
    to the task in turn, or the connection stays open until a garbage collection finds the circle.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def check_health(channel: grpc.aio.Channel, timeout_s: float | None = None) -> bool:
    """Check once whether a process is serving; `timeout_s` None: no deadline.

    Raises:
        TandemError: the process did not respond.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    return bool(response.status == SERVING)
