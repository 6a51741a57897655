"""Legs whose calls are played instead of made."""

from __future__ import annotations

import asyncio
from typing import Any

from tandem.api.decode.v1.decode_service_pb2 import DecodeResponse
from tandem.api.types.v1 import leg_pb2
from tandem.errors import TandemError

ACCEPTED = DecodeResponse(accepted=leg_pb2.LegAccepted(worker_id="w", epoch=7))


class PlayedCall:
    """A leg's call that plays events; `say` adds one later. Reads like LegCall."""

    def __init__(self, *events: Any) -> None:
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = asyncio.Event()
        for event in events:
            self.say(event)

    def say(self, event: Any) -> None:
        """An event, None for the end of the stream, or an error."""
        self._events.put_nowait(event)

    async def read(self) -> Any:
        next_event = asyncio.ensure_future(self._events.get())
        cancelled = asyncio.ensure_future(self.cancelled.wait())
        try:
            await asyncio.wait({next_event, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
            if not next_event.done():
                next_event.cancel()
        if next_event.cancelled() or not next_event.done():
            raise asyncio.CancelledError
        event = next_event.result()
        if isinstance(event, TandemError):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled.set()
