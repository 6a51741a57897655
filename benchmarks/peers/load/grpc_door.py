"""`Generate` over gRPC, many streams over few connections."""

from __future__ import annotations

import asyncio

from benchmarks.peers.grpc_wire import OK, GrpcClient
from benchmarks.peers.load.streams import Load, Stream
from tandem.api.frontend.v1 import inference_service_pb2 as pb

GENERATE = "/tandem.api.frontend.v1.InferenceService/Generate"


class Connections:
    """Connections to one or several addresses in turn. One that is lost is made again."""

    def __init__(self, addresses: list[str], count: int) -> None:
        self._addresses = [addresses[number % len(addresses)] for number in range(count)]
        self._clients: list[GrpcClient | None] = [None] * count
        self._making: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Return when all are there."""
        await asyncio.gather(*(self._make(number) for number in range(len(self._addresses))))

    def get(self, number: int) -> GrpcClient | None:
        """The one of a stream; None while it is being made again."""
        place = number % len(self._addresses)
        client = self._clients[place]
        if client is not None and client.transport is None:
            client = self._clients[place] = None
            task = asyncio.get_running_loop().create_task(self._make(place))
            self._making.add(task)
            task.add_done_callback(self._making.discard)
        return client

    async def _make(self, place: int) -> None:
        address = self._addresses[place]
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, self._clients[place] = await loop.create_connection(lambda: GrpcClient(address), host, int(port))
            except OSError:
                await asyncio.sleep(0.2)
            else:
                return


class GenerateStream(Stream):
    """A client of Tandem's own API."""

    def __init__(self, load: Load, connections: Connections, number: int) -> None:
        super().__init__(load)
        self._connections = connections
        self._number = number
        self._request = pb.GenerateRequest(model=load.plan.model)
        self._request.chat.messages.add(role="user")
        self._request.stopping.max_tokens = load.plan.max_tokens
        self._request.stopping.ignore_eos = True
        if load.plan.coalesce_ms is not None:
            self._request.coalesce_ms = load.plan.coalesce_ms

    def send(self, prompt: str) -> None:
        """One call."""
        client = self._connections.get(self._number)
        if client is None:
            self.load.loop.call_soon(self.ended, "no connection")
            return
        self._request.chat.messages[0].content = prompt
        client.call(GENERATE, self._request.SerializeToString(), self)

    def on_message(self, message: bytes, at_s: float) -> None:
        """One event of the stream."""
        event = pb.GenerateResponse.FromString(message)
        if event.HasField("chunk") and event.chunk.token_ids:
            self.got(len(event.chunk.token_ids), at_s)

    def on_end(self, status: int, text: str) -> None:
        """The status of the call."""
        self.ended("" if status == OK else f"status {status}: {text[:80]}")
