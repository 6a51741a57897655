"""Between gRPC and every handler: what a handler raises becomes one status on the wire.

The only broad `except` of the request path. Handlers raise `TandemError` and never call `context.abort`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass

from tandem.errors import TandemError
from tandem.rpc.malformed import checked_deserializer
from tandem.rpc.status import abort

log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a status, and a request that cannot be parsed into INVALID_REQUEST.

    It stands around every handler of Tandem, and so it also counts the calls that are being answered.
    """

    def __init__(self, request_bytes_max: int) -> None:
        """A longer request is refused before it is parsed."""
        self._request_bytes_max = request_bytes_max
        self.calls = Calls()
        """That are being answered, and that have failed."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler gRPC found; unknown methods and foreign services (health, reflection) pass unchanged."""
        self._keep(asyncio.current_task())
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/tandem."):
            return handler
        return _wrap(handler, method, _deserializer(method, self._request_bytes_max), self.calls)

    async def wait_ended(self, timeout_s: float) -> None:
        """Return when gRPC has ended its own part of every call too, foreign services' included."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _keep(self, task: asyncio.Task[Any] | None) -> None:
        """Called in the task that gRPC makes for each call."""
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class Calls:
    """Counts calls from their first byte to their last, and how those that failed did."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: Counter[str] = Counter()
        """By the reason of the error."""

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        self.count -= 1


def _wrap(handler: Any, method: str, deserializer: Any, calls: Calls) -> Handler:
    if handler.unary_unary:
        wrapped = _unary(handler.unary_unary, method, calls)
        return grpc.unary_unary_rpc_method_handler(wrapped, deserializer, handler.response_serializer)
    if handler.unary_stream:
        stream = _stream(handler.unary_stream, method, calls)
        return grpc.unary_stream_rpc_method_handler(stream, deserializer, handler.response_serializer)
    if handler.stream_stream:
        stream = _stream(_over_checked(handler.stream_stream), method, calls)
        return grpc.stream_stream_rpc_method_handler(stream, deserializer, handler.response_serializer)
    return handler  # type: ignore[no-any-return]


def _deserializer(method: str, request_bytes_max: int) -> Any:
    service, name = method.removeprefix("/").split("/")
    request = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type
    return checked_deserializer(GetMessageClass(request), request_bytes_max)


def _over_checked(
    behavior: Callable[[Any, Context], AsyncIterator[Any]],
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    """A behaviour over a stream of requests, in which one that cannot be parsed is raised where it is read."""

    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, TandemError):
                raise request
            yield request

    return lambda requests, context: behavior(checked(requests), context)


def _unary(
    behavior: Callable[[Any, Context], Awaitable[Any]], method: str, calls: Calls
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def handle(request: Any, context: Context) -> Any:
        try:
            with calls:
                if isinstance(request, TandemError):
                    raise request
                return await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as problem:
            failure = _as_error(problem, method)
            calls.failures[failure.reason] += 1
        request = None
        await abort(context, failure)
        raise AssertionError("abort raises")

    return handle


def _stream(
    behavior: Callable[[Any, Context], AsyncIterator[Any]], method: str, calls: Calls
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
        responses, failure = None, None
        calls.count += 1
        try:
            if isinstance(request, TandemError):
                raise request
            responses = behavior(request, context)
            async for response in responses:
                yield response
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as problem:
            failure = _as_error(problem, method)
            calls.failures[failure.reason] += 1
        finally:
            calls.count -= 1
            if responses is not None:
                # A client that leaves while gRPC waits for flow control closes this generator; the inner one must
                # be closed here and now, not when the garbage collector finds it.
                await responses.aclose()  # type: ignore[attr-defined]
        if failure is not None:
            request = None
            await abort(context, failure)

    return handle


def _as_error(problem: Exception, method: str) -> TandemError:
    """The error a client is told, without a way back to the request.

    gRPC keeps what `abort` raises in a cycle that waits for the garbage collector. Whatever can be reached from there
    waits too: of a client that is refused, all its megabytes, again and again.
    """
    if isinstance(problem, TandemError):
        problem.__traceback__ = problem.__context__ = problem.__cause__ = None
        return problem
    log.error("defect in the handler of %s", method, exc_info=problem)
    return TandemError(f"internal error in {method}: {type(problem).__name__}")
