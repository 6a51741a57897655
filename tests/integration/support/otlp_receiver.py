"""A real OTLP receiver: a gRPC server with the collector's trace service, which keeps the spans it is sent.

It may also hang: take calls and never answer them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from tandem.testing.eventually import assert_eventually


@dataclass(frozen=True)
class Received:
    """A span as it came over the wire."""

    service: str
    instance: str
    span: trace_pb2.Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def span_id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent_id(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def begin_s(self) -> float:
        return self.span.start_time_unix_nano / 1e9

    @property
    def end_s(self) -> float:
        return self.span.end_time_unix_nano / 1e9

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def attributes(self) -> dict[str, Any]:
        return values(self.span.attributes)

    @property
    def links(self) -> list[str]:
        return [link.span_id.hex() for link in self.span.links]


class Receiver(TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.call_count = 0
        self.hangs = False
        self.address = ""

    async def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
        self.call_count += 1
        if self.hangs:
            await asyncio.sleep(3600)
        for resource_spans in request.resource_spans:
            resource = values(resource_spans.resource.attributes)
            service, instance = resource["service.name"], resource.get("service.instance.id", "")
            for scope_spans in resource_spans.scope_spans:
                self.spans += [Received(service, instance, span) for span in scope_spans.spans]
        return pb.ExportTraceServiceResponse()

    async def trace(self, request_id: str, *names: str, within_s: float = 15) -> list[Received]:
        """All spans of a request, once those of these names are among them, in the order of their begin."""

        def found() -> list[Received]:
            ids = {span.trace_id for span in self.spans if span.attributes.get("tandem.request_id") == request_id}
            return sorted((span for span in self.spans if span.trace_id in ids), key=lambda span: span.begin_s)

        def complete(spans: list[Received]) -> bool:
            return set(names) <= {span.name for span in spans}

        await assert_eventually(found, complete, within_s=within_s, what=f"spans {names} of {request_id}")
        return found()


def values(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)


@asynccontextmanager
async def receiver(port: int = 0) -> AsyncIterator[Receiver]:
    """A receiver at `address`."""
    kept = Receiver()
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    add_TraceServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    kept.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield kept
    finally:
        await server.stop(0)
