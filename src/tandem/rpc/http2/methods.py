"""Which handler answers which path: looks like a grpc.aio.Server to generated `add_XServicer_to_server` functions.

Owns the table and the guard around its handlers. Calls none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from tandem.errors import InvalidRequest
from tandem.rpc.handler_guard import Handler, HandlerGuard


class Method:
    """One method of a service, ready to be called."""

    __slots__ = ("_parse", "behavior", "is_streamed", "is_streaming", "path", "serialize")

    def __init__(self, path: str, handler: Any) -> None:
        """Take apart what gRPC's generated code describes a method with.

        Raises:
            ValueError: a stream of requests with one response, which no service of ours has.
        """
        self.path = path
        self.behavior = handler.unary_unary or handler.unary_stream or handler.stream_stream
        if self.behavior is None:
            raise ValueError(f"{path}: a stream of requests with one response is not served")
        self.is_streamed: bool = handler.request_streaming
        """Whether there is a stream of requests."""
        self.is_streaming: bool = handler.response_streaming
        self.serialize = handler.response_serializer or bytes
        self._parse = handler.request_deserializer

    def request(self, data: bytes) -> Any:
        """A request from its bytes; a guarded handler is given the error where it cannot be parsed.

        Raises:
            InvalidRequest: it cannot be parsed, and the handler is a foreign one.
        """
        if self._parse is None:
            return data
        try:
            return self._parse(data)
        except Exception:  # a parser of any message may raise anything
            raise InvalidRequest("request", "is not a message of this method") from None


class Methods:
    """All of a server, by path."""

    def __init__(self, guard: HandlerGuard) -> None:
        self._guard = guard
        self._by_path: dict[str, Method] = {}
        self._generic: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As grpc.aio.Server does: each is asked for paths that are not known by name."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Handler]) -> None:
        """As grpc.aio.Server does: the handlers of one service by the names of its methods."""
        for name, handler in method_handlers.items():
            path = f"/{service_name}/{name}"
            self._by_path[path] = Method(path, self._guard.guarded(path, handler))

    def find(self, path: str) -> Method | None:
        """The method of a path; None: there is no such."""
        method = self._by_path.get(path)
        if method is not None:
            return method
        details = _Details(path)
        for generic in self._generic:
            handler: Any = generic.service(details)
            if handler is not None and not handler.stream_unary:
                method = self._by_path[path] = Method(path, self._guard.guarded(path, handler))
                return method
        return None


class _Details(grpc.HandlerCallDetails):
    """What a generic handler is asked with."""

    def __init__(self, path: str) -> None:
        self.method = path
        self.invocation_metadata = ()
