"""An engine's end of the KV event sockets: real sockets, SGLang's framing, and messages that the test can drop."""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tandem.engine.sglang.kv_events import DUMP, endpoints


class KvPublisher:
    """See the module; use `publisher`."""

    def __init__(self, directory: Path, kept: int) -> None:
        import zmq
        import zmq.asyncio

        self.directory = directory
        self.answers = True
        """Whether it reports its cache when it is asked."""
        self.asked: list[int] = []
        self.cached: set[int] = set()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=kept)
        self._sequence = 0
        context = zmq.asyncio.Context.instance()
        events, replay = endpoints(directory)
        self.events = context.socket(zmq.PUB)
        self.events.bind(events)
        self.replay = context.socket(zmq.ROUTER)
        self.replay.bind(replay)

    async def publish(self, *events: dict[str, Any], drop: bool = False) -> None:
        """Publish one batch; `drop`: as if the socket had dropped it."""
        import msgspec

        for event in events:
            if event["type"] == "BlockStored":
                self.cached.update(event["block_hashes"])
            elif event["type"] == "BlockRemoved":
                self.cached.difference_update(event["block_hashes"])
            elif event["type"] == "AllBlocksCleared":
                self.cached.clear()
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        payload = msgspec.msgpack.encode([0.0, events, 0])
        self._kept.append((sequence, payload))
        if not drop:
            await self.events.send_multipart([b"", sequence, payload])

    async def dump(self, number: int) -> None:
        """What the hook in the scheduler does."""
        self.asked.append(number)
        if self.answers:
            await self.publish({"type": DUMP, "number": number, "block_hashes": sorted(self.cached)})

    async def serve(self) -> None:
        """Answer replay requests, as SGLang's publisher thread does."""
        while True:
            client, _, begin = await self.replay.recv_multipart()
            for sequence, payload in self._kept:
                if sequence >= begin:
                    await self.replay.send_multipart([client, b"", b"", sequence, payload])
            await self.replay.send_multipart([client, b"", b"", b"\xff" * 8, b""])


@asynccontextmanager
async def publisher(kept: int = 100) -> AsyncIterator[KvPublisher]:
    """A publisher that keeps so many batches for replays."""
    # Not pytest's directory: the path of a socket is at most 107 characters long.
    with tempfile.TemporaryDirectory() as directory:
        engine = KvPublisher(Path(directory), kept)
        serving = asyncio.create_task(engine.serve())
        try:
            yield engine
        finally:
            serving.cancel()
            engine.events.close(0)
            engine.replay.close(0)
