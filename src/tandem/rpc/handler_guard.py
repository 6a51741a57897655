"""Wraps every Tandem handler, on either server: an exception becomes a status on the wire.

The one place that maps errors to statuses. Handlers raise `TandemError` and never call `context.abort`. Knows no
transport: `tandem.rpc.server` and `tandem.rpc.http2` apply it to the handlers that they find.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass

from tandem.errors import TandemError
from tandem.rpc.request_decoding import checked_deserializer
from tandem.rpc.status import abort

log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Context: TypeAlias = Any
"""A grpc.aio.ServicerContext, or a tandem.rpc.http2.call.Call, which has the methods that handlers use."""


class Calls:
    """Counts open calls, and failed ones by reason."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: Counter[str] = Counter()
        """By the error's reason."""

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *exception: object) -> None:
        self.count -= 1


class HandlerGuard:
    """Turns a handler's exceptions into statuses, and an unreadable request into INVALID_REQUEST."""

    def __init__(self, request_bytes_max: int) -> None:
        """`request_bytes_max`: a larger request is rejected before it is parsed."""
        self.request_bytes_max = request_bytes_max
        self.calls = Calls()
        """Open and failed calls of all handlers."""
        self._guarded: dict[str, Handler] = {}

    def guarded(self, method: str, handler: Handler) -> Handler:
        """The wrapped handler of a Tandem service; those of other services (health, reflection) are returned as is.

        `method` is the full name, "/package.Service/Method". Each is wrapped once: building a deserialiser is slow.
        """
        if not method.startswith("/tandem."):
            return handler
        found = self._guarded.get(method)
        if found is None:
            deserializer = _deserializer(method, self.request_bytes_max)
            found = self._guarded[method] = _wrap(handler, method, deserializer, self.calls)
        return found


def _wrap(handler: Any, method: str, deserializer: Any, calls: Calls) -> Handler:
    if handler.unary_unary:
        wrapped = _awaited(handler.unary_unary, method, calls)
        return grpc.unary_unary_rpc_method_handler(wrapped, deserializer, handler.response_serializer)
    if handler.unary_stream:
        around: Any = _awaited if inspect.iscoroutinefunction(handler.unary_stream) else _stream
        stream = around(handler.unary_stream, method, calls)
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
    """A handler of a request stream, in which an unreadable request raises its error where it is read."""

    async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, TandemError):
                raise request
            yield request

    return lambda requests, context: behavior(checked(requests), context)


def _awaited(
    behavior: Callable[[Any, Context], Awaitable[Any]], method: str, calls: Calls
) -> Callable[[Any, Context], Awaitable[Any]]:
    """Wrap a coroutine function: of a unary method, or of a stream that the handler writes itself."""

    async def handle(request: Any, context: Context) -> Any:
        try:
            with calls:
                if isinstance(request, TandemError):
                    raise request
                return await behavior(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as problem:  # here every error of a handler becomes a status
            failure = as_error(problem, method)
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
        except Exception as problem:  # here every error of a handler becomes a status
            failure = as_error(problem, method)
            calls.failures[failure.reason] += 1
        finally:
            calls.count -= 1
            if responses is not None:
                # When a client cancels while gRPC waits for flow control, this generator is closed. The inner one must
                # be closed now, not whenever the garbage collector finds it.
                await responses.aclose()  # type: ignore[attr-defined]
        if failure is not None:
            request = None
            await abort(context, failure)

    return handle


def as_error(problem: Exception, method: str) -> TandemError:
    """The error that is sent to the client, without a reference to the request.

    gRPC keeps the exception of `abort` in a reference cycle until the next garbage collection, with everything it
    references: that would be all megabytes of each rejected request.
    """
    if isinstance(problem, TandemError):
        problem.__traceback__ = problem.__context__ = problem.__cause__ = None
        return problem
    log.error(
        "bug in this service in the handler of %s: the call fails with an internal error, others do not",
        method,
        exc_info=problem,
    )
    return TandemError(f"internal error in {method}: {type(problem).__name__}")
