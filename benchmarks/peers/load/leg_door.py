"""Decode legs asked directly, without a frontend: what the fake workers do by themselves, by either contract."""

from __future__ import annotations

import random

from benchmarks.peers.grpc_wire import OK, GrpcClient
from benchmarks.peers.load.grpc_door import Connections
from benchmarks.peers.load.streams import Load, Stream
from tandem.api.decode.v1 import decode_service_pb2 as decode1_pb2
from tandem.api.decode.v2 import decode_service_pb2 as decode2_pb2
from tandem.api.types.v1 import leg_pb2
from tandem.api.worker.v2 import step_service_pb2 as step_pb2

DECODE = "/tandem.api.decode.v1.DecodeService/Decode"
START = "/tandem.api.decode.v2.DecodeService/StartLegs"
STEPS = "/tandem.api.worker.v2.StepService/StreamSteps"
ROOM_BITS = 62


def leg_request(load: Load, prompt: str, number: int, worker: str) -> leg_pb2.LegRequest:
    """A leg as a frontend would send it."""
    request = leg_pb2.LegRequest(
        request_id=f"direct-{number}-{load.begun}",
        attempt=1,
        worker_epoch=load.plan.starts[worker],
        model=load.plan.model,
        token_ids=[load.words.ids[load.words.digit_by_text[word]] for word in prompt.split()],
    )
    request.stopping.max_tokens = load.plan.max_tokens
    request.stopping.ignore_eos = True
    request.bootstrap.host, request.bootstrap.port = "127.0.0.1", 1
    request.bootstrap.room = random.getrandbits(ROOM_BITS) + 1
    return request


class Contract1Stream(Stream):
    """A client of `Decode`."""

    def __init__(self, load: Load, connections: Connections, number: int) -> None:
        super().__init__(load)
        self._connections = connections
        self._number = number
        self._worker = f"decode-{number % len(load.plan.addresses)}"

    def send(self, prompt: str) -> None:
        """One call."""
        client = self._connections.get(self._number)
        if client is None:
            self.load.loop.call_soon(self.ended, "no connection")
            return
        leg = leg_request(self.load, prompt, self._number, self._worker)
        client.call(DECODE, decode1_pb2.DecodeRequest(leg=leg).SerializeToString(), self)

    def on_message(self, message: bytes, at_s: float) -> None:
        """One event of the leg."""
        event = decode1_pb2.DecodeResponse.FromString(message)
        if event.HasField("tokens"):
            self.got(len(event.tokens.token_ids), at_s)

    def on_end(self, status: int, text: str) -> None:
        """The status of the call."""
        self.ended("" if status == OK else f"status {status}: {text[:80]}")


class StepReader:
    """One worker's stream of steps, and whose legs are on it."""

    def __init__(self, load: Load, client: GrpcClient, worker: str) -> None:
        self._client = client
        self._number = 0
        self._last_leg = 0
        self._legs: dict[int, Stream] = {}
        request = step_pb2.StreamStepsRequest(
            leg_contract=2, worker_epoch=load.plan.starts[worker], frontend_id="benchmark"
        )
        client.call(STEPS, request.SerializeToString(), self)

    def start(self, leg: leg_pb2.LegRequest, stream: Stream) -> None:
        """Start one leg."""
        if not self._number:
            stream.load.loop.call_soon(stream.ended, "the step stream is not open yet")
            return
        self._last_leg += 1
        self._legs[self._last_leg] = stream
        request = decode2_pb2.StartLegsRequest(stream_id=self._number)
        request.legs.add(leg=self._last_leg, request=leg)
        self._client.call(START, request.SerializeToString(), Started(stream))

    def on_message(self, message: bytes, at_s: float) -> None:
        """One step."""
        step = step_pb2.StreamStepsResponse.FromString(message)
        self._number = step.stream_id or self._number
        counts = step.counts or [1] * len(step.legs)
        for leg, count in zip(step.legs, counts, strict=True):
            if leg in self._legs:
                self._legs[leg].got(count, at_s)
        for end in step.ends:
            stream = self._legs.pop(end.leg, None)
            if stream is not None:
                stream.ended("" if end.HasField("finish") else end.failure.message)

    def on_end(self, status: int, text: str) -> None:
        """The worker has gone."""
        legs, self._legs = list(self._legs.values()), {}
        for stream in legs:
            stream.ended(f"the step stream ended with {status}: {text[:80]}")


class Started:
    """The answer to StartLegs of one leg."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def on_message(self, message: bytes, at_s: float) -> None:
        """Taken or refused."""
        result = decode2_pb2.StartLegsResponse.FromString(message).results[0]
        if result.HasField("refused"):
            self._stream.ended(result.refused.message)

    def on_end(self, status: int, text: str) -> None:
        """The status of the call."""
        if status != OK:
            self._stream.ended(f"status {status}: {text[:80]}")


class Contract2Stream(Stream):
    """A client of `StartLegs`."""

    def __init__(self, load: Load, readers: list[StepReader], number: int) -> None:
        super().__init__(load)
        self._reader = readers[number % len(readers)]
        self._number = number
        self._worker = f"decode-{number % len(readers)}"

    def send(self, prompt: str) -> None:
        """One leg."""
        self._reader.start(leg_request(self.load, prompt, self._number, self._worker), self)
