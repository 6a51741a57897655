"""The calls of an attempt's legs, as their owner reads them: events in order, failures as TandemError.

Owns nothing but the call; what a failure means for the other leg is the supervisor's business.
"""

from __future__ import annotations

from typing import Any

import grpc

from tandem.api.decode.v1 import decode_service_pb2
from tandem.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from tandem.api.prefill.v1 import prefill_service_pb2
from tandem.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tandem.api.types.v1 import leg_pb2
from tandem.observe.trace_context import Headers
from tandem.rpc.channels import Channels
from tandem.rpc.status import from_rpc_error

LegEvent = prefill_service_pb2.PrefillResponse | decode_service_pb2.DecodeResponse
"""Both have one oneof: accepted, progress, tokens, finish."""


class LegCall:
    """One leg's stream of events."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> LegEvent | None:
        """The next event; None after the last one.

        Raises:
            TandemError: the leg failed.
            asyncio.CancelledError: `cancel` was called, or the reader was cancelled.
        """
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        return None if event is grpc.aio.EOF else event

    def cancel(self) -> None:
        """End the call, which aborts the leg in its engine. Harmless after its end."""
        self._call.cancel()


def open_prefill(
    channels: Channels, address: str, leg: leg_pb2.LegRequest, timeout_s: float | None, headers: Headers = ()
) -> LegCall:
    """Send a prefill leg to a worker."""
    stub: Any = PrefillServiceStub(channels.get(address))
    return LegCall(stub.Prefill(prefill_service_pb2.PrefillRequest(leg=leg), timeout=timeout_s, metadata=headers))


def open_decode(
    channels: Channels, address: str, leg: leg_pb2.LegRequest, timeout_s: float | None, headers: Headers = ()
) -> LegCall:
    """Send a decode leg to a worker."""
    stub: Any = DecodeServiceStub(channels.get(address))
    return LegCall(stub.Decode(decode_service_pb2.DecodeRequest(leg=leg), timeout=timeout_s, metadata=headers))
