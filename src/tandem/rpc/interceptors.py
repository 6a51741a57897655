"""The interceptor of grpc.aio servers: wraps each handler with `tandem.rpc.handler_guard`.

Keeps the tasks that gRPC creates for its calls, so that a server can wait for their end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from tandem.rpc.handler_guard import Handler, HandlerGuard


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Guards every handler of Tandem."""

    def __init__(self, guard: HandlerGuard) -> None:
        self._guard = guard
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler; unknown methods and other services (health, reflection) pass unchanged."""
        self._keep(asyncio.current_task())
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guard.guarded(handler_call_details.method, handler)

    async def wait_ended(self, timeout_s: float) -> None:
        """Return when gRPC's own tasks of all calls have ended, or after `timeout_s`."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _keep(self, task: asyncio.Task[Any] | None) -> None:
        """Called in the task that gRPC creates for each call."""
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
