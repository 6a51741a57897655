"""The lines that two simulated engines exchange over one connection per room.

decode -> prefill: hello {room}; prefill -> decode: met, begin {prompt_tokens, size_bytes}, part {size_bytes} for each
part that has moved, end {state}; decode -> prefill: done {size_bytes}, the sum of what came. Each is one JSON object on
one line; Python's JSON keeps a 63-bit room whole.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from tandem.engine.simulated.network import Writer
from tandem.engine.simulated.tokens import STATE_BYTES, SequenceState


class ConnectionLost(Exception):
    """The other engine closed the connection or sent something else than its turn asks for."""


@dataclass(frozen=True, slots=True)
class KvHeader:
    """What is about to move."""

    prompt_tokens: int
    size_bytes: int


class Line:
    """One end of a connection, message by message."""

    def __init__(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer

    def close(self) -> None:
        """Hang up at once; the other end sees ConnectionLost."""
        self._writer.close()

    async def send(self, kind: str, **body: Any) -> None:
        """Write one message.

        Raises:
            ConnectionLost: the other end is gone.
        """
        try:
            self._writer.write(json.dumps({"kind": kind, **body}).encode() + b"\n")
            await self._writer.drain()
        except OSError as problem:
            raise ConnectionLost(str(problem)) from None

    async def receive(self, kind: str, **body: type) -> dict[str, Any]:
        """Read the message that is due.

        Args:
            kind: which one it must be.
            body: its fields with their types.

        Raises:
            ConnectionLost: the other end is gone, or it said something else.
        """
        try:
            line = await self._reader.readline()
            message = json.loads(line) if line else None
        except (OSError, ValueError) as problem:
            raise ConnectionLost(f"unreadable message: {problem}") from None
        if message is None:
            raise ConnectionLost("it closed the connection")
        if not isinstance(message, dict) or message.get("kind") != kind:
            raise ConnectionLost(f"it sent {str(message)[:100]} where {kind} was due")
        if any(type(message.get(name)) is not wanted for name, wanted in body.items()):
            raise ConnectionLost(f"it sent a malformed {kind}")
        return message


def parse_state(text: str) -> SequenceState:
    """The state out of its hexadecimal form.

    Raises:
        ConnectionLost: it is none.
    """
    try:
        state = bytes.fromhex(text)
    except ValueError:
        raise ConnectionLost("it sent a malformed state") from None
    if len(state) != STATE_BYTES:
        raise ConnectionLost("it sent a state of another length")
    return state
