"""The messages between two simulated engines, over one connection per bootstrap room.

decode -> prefill: hello {room, cached_tokens}; prefill -> decode: met, begin {prompt_tokens, size_bytes}, part
{size_bytes} for each transferred part, end {state} with {kv_digest} where it is to be checked; decode -> prefill: done
{size_bytes}, the sum of the parts. Each message is one line with one JSON object; Python's JSON keeps a 63-bit room
exact.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tandem.engine.simulated.network import Writer
from tandem.engine.simulated.tokens import STATE_BYTES, SequenceState


class ConnectionLost(Exception):
    """The other engine closed the connection or sent an unexpected message."""


@dataclass(frozen=True, slots=True)
class KvHeader:
    """Size of the KV that is about to be transferred."""

    prompt_tokens: int
    size_bytes: int


class Line:
    """One end of a connection: sends and receives messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer

    def close(self) -> None:
        """Close the connection at once; the other end gets ConnectionLost."""
        self._writer.close()

    async def send(self, kind: str, **body: Any) -> None:
        """Write one message.

        Raises:
            ConnectionLost: the other end has closed the connection.
        """
        try:
            self._writer.write(json.dumps({"kind": kind, **body}).encode() + b"\n")
            await self._writer.drain()
        except OSError as problem:
            raise ConnectionLost(str(problem)) from None

    async def receive(self, kind: str, **body: type) -> dict[str, Any]:
        """Read the next message.

        Args:
            kind: expected kind.
            body: expected fields with their types.

        Raises:
            ConnectionLost: the other end has closed the connection, or sent another message.
        """
        try:
            line = await self._reader.readline()
            message = json.loads(line) if line else None
        except (OSError, ValueError) as problem:
            raise ConnectionLost(f"unreadable message: {problem}") from None
        if message is None:
            raise ConnectionLost("it closed the connection")
        if not isinstance(message, dict) or message.get("kind") != kind:
            raise ConnectionLost(f"it sent {str(message)[:100]}, expected {kind}")
        if any(type(message.get(name)) is not wanted for name, wanted in body.items()):
            raise ConnectionLost(f"it sent a malformed {kind}")
        return message


def parse_state(text: str) -> SequenceState:
    """Parse a state from hexadecimal.

    Raises:
        ConnectionLost: it is malformed or has another length than STATE_BYTES.
    """
    try:
        state = bytes.fromhex(text)
    except ValueError:
        raise ConnectionLost("it sent a malformed state") from None
    if len(state) != STATE_BYTES:
        raise ConnectionLost(f"it sent a state of {len(state)} bytes, expected {STATE_BYTES}")
    return state
