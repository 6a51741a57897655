"""What a peer says of its health over grpc.health.v1: a stream that is silent until it changes, and a question.

Asks over channels that are there; what follows from an answer, or from none, is the caller's business.
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
    """The health of a process as a whole, followed over one stream. Close it in the end."""

    def __init__(self, channel: grpc.aio.Channel, *, waits: bool) -> None:
        """Asks at once. With `waits`, as long as it takes to connect; else who cannot be reached is an error."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        self._call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=waits)

    async def read(self) -> bool:
        """Whether it serves: at the first call now, then at each change.

        Raises:
            TandemError: the stream ended, as it does when the process dies.
        """
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServiceError("the channel was closed") from None
        if answer is grpc.aio.EOF:
            raise ServiceError("the stream of health ended")
        return bool(answer.status == SERVING)

    def close(self) -> None:
        """Ask no more."""
        self._call.cancel()


async def check_health(channel: grpc.aio.Channel, timeout_s: float | None = None) -> bool:
    """Whether a process says that it serves, within `timeout_s` where that is given.

    Raises:
        TandemError: it did not answer.
    """
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as failure:
        raise from_rpc_error(failure) from None
    return bool(answer.status == SERVING)
