"""Legs by contract 2: one stream of steps for each frontend, one message for each step.

Owns `StreamSteps`, `StartLegs` and `AbortLegs` of a fake worker.
"""

from __future__ import annotations

import itertools
import random
import time

from benchmarks.peers.grpc_wire import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    UNAVAILABLE,
    UNIMPLEMENTED,
    Method,
    ServerCall,
)
from benchmarks.peers.workers.steps import OpenStream
from benchmarks.peers.workers.tandem_worker import FakeWorker, end_with, finish_of, refusal
from tandem.api.decode.v2 import decode_service_pb2
from tandem.api.prefill.v2 import prefill_service_pb2
from tandem.api.types.v1 import generation_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2 import step_service_pb2 as step_pb2

VERSION = 2
ABORTED = generation_pb2.FINISH_REASON_ABORTED
STEPS = "/tandem.api.worker.v2.StepService/StreamSteps"
ABORT = "/tandem.api.worker.v2.StepService/AbortLegs"
START_PREFILL = "/tandem.api.prefill.v2.PrefillService/StartLegs"
START_DECODE = "/tandem.api.decode.v2.DecodeService/StartLegs"


class StepStream:
    """One frontend's stream: its open legs, and what the next message is to hold."""

    def __init__(self, number: int, call: ServerCall) -> None:
        self.number = number
        self.call = call
        self.legs: dict[int, Leg] = {}
        self._next = step_pb2.StreamStepsResponse()
        self._holds_several = False
        self._counts: list[int] = []

    def add_tokens(self, leg: Leg, token_ids: list[int]) -> None:
        """Tokens of one leg, in the next message."""
        self._next.legs.append(leg.number)
        self._next.indices.append(leg.sent)
        self._next.token_ids.extend(token_ids)
        self._counts.append(len(token_ids))
        self._holds_several |= len(token_ids) != 1

    def add_end(self, leg: Leg) -> None:
        """The end of one leg, in the next message."""
        finish = finish_of(leg, leg.prompt_tokens)
        if leg.sent < leg.total:
            finish.reason = ABORTED
        self._next.ends.add(leg=leg.number, finish=finish)
        self.legs.pop(leg.number, None)

    def add_alive(self, leg: Leg) -> None:
        """One leg that has nothing to say, in the next message."""
        self._next.alive.append(leg.number)

    def send(self) -> None:
        """Send the message."""
        if self._holds_several:
            self._next.counts.extend(self._counts)
        self.call.send(self._next.SerializeToString())
        self.call.connection.flush()
        self._next = step_pb2.StreamStepsResponse()
        self._holds_several = False
        self._counts = []


class Leg(OpenStream):
    """A leg and the stream it goes out on."""

    __slots__ = ("number", "prompt_tokens", "stream")

    def __init__(self, stream: StepStream, start: leg2_pb2.LegStart, serial: int | None, total: int, now_s: float):
        super().__init__(serial, total, now_s)
        self.stream = stream
        self.number = start.leg
        self.prompt_tokens = len(start.request.token_ids)


class Contract2Worker(FakeWorker):
    """A worker whose legs share one stream for each frontend."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._streams: dict[int, StepStream] = {}
        self._numbers = itertools.count(random.getrandbits(40) + 1)

    def methods(self) -> dict[str, Method]:
        """Its role's StartLegs, the stream of steps, and what all workers answer."""
        start: dict[str, Method] = {START_PREFILL: self._start} if self.is_prefill else {START_DECODE: self._start}
        return {**super().methods(), STEPS: self._open, ABORT: self._abort, **start}

    def on_step(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        """A message for each frontend."""
        streams: dict[int, StepStream] = {}
        for leg in due:
            assert isinstance(leg, Leg)
            count = leg.take(self.tokens_at_once)
            leg.stream.add_tokens(leg, self.answer_ids(leg, count))
            leg.sent += count
            if leg.sent >= leg.total:
                leg.stream.add_end(leg)
            streams[leg.stream.number] = leg.stream
        for leg in silent:
            assert isinstance(leg, Leg)
            leg.stream.add_alive(leg)
            streams[leg.stream.number] = leg.stream
        for stream in streams.values():
            stream.send()

    def _open(self, call: ServerCall, message: bytes) -> None:
        request = step_pb2.StreamStepsRequest.FromString(message)
        if request.leg_contract != VERSION:
            sentence = f"this worker speaks leg contract {VERSION}, the caller speaks {request.leg_contract}"
            return end_with(call, refusal(UNIMPLEMENTED, "NOT_SUPPORTED", sentence))
        if request.worker_epoch != self.identity.epoch:
            sentence = f"this is epoch {self.identity.epoch}, not {request.worker_epoch}"
            return end_with(call, refusal(FAILED_PRECONDITION, "STALE_EPOCH", sentence))
        stream = StepStream(next(self._numbers), call)
        self._streams[stream.number] = stream
        call.on_cancel = lambda: self._close(stream)
        call.send(step_pb2.StreamStepsResponse(stream_id=stream.number).SerializeToString())
        return None

    def _close(self, stream: StepStream) -> None:
        """The frontend has gone: so have its legs."""
        self._streams.pop(stream.number, None)
        for leg in stream.legs.values():
            self.steps.remove(leg)
        stream.legs.clear()

    def _start(self, call: ServerCall, message: bytes) -> None:
        # Both roles' requests have the same fields.
        request = decode_service_pb2.StartLegsRequest.FromString(message)
        stream = self._streams.get(request.stream_id)
        if stream is None:
            return call.finish(UNAVAILABLE, "the step stream is not open")
        results = [self._take(stream, start) for start in request.legs]
        service = prefill_service_pb2 if self.is_prefill else decode_service_pb2
        call.send(service.StartLegsResponse(results=results).SerializeToString())
        call.finish()
        if self.is_prefill and stream.legs:
            self._hand_over(stream)
        return None

    def _take(self, stream: StepStream, start: leg2_pb2.LegStart) -> leg2_pb2.LegStartResult:
        problem = self.problem_of(start.request)
        if problem is None and (not start.leg or start.leg in stream.legs):
            problem = refusal(INVALID_ARGUMENT, "INVALID_REQUEST", f"leg: must be at least 1 and new, not {start.leg}")
        if problem is not None:
            return leg2_pb2.LegStartResult(refused=problem)
        serial = None if self.is_prefill else self.words.serial_of_ids(start.request.token_ids)
        leg = stream.legs[start.leg] = Leg(stream, start, serial, self.tokens_of(start.request), time.monotonic())
        if not self.is_prefill:
            self.steps.add(leg)
        return leg2_pb2.LegStartResult(accepted=self.accepted())

    def _hand_over(self, stream: StepStream) -> None:
        """Prefill: the first token and the end of every leg, at once."""
        for leg in list(stream.legs.values()):
            stream.add_tokens(leg, self.answer_ids(leg, 1))
            leg.sent = 1
            stream.add_end(leg)
        stream.send()

    def _abort(self, call: ServerCall, message: bytes) -> None:
        request = step_pb2.AbortLegsRequest.FromString(message)
        stream = self._streams.get(request.stream_id)
        legs = [] if stream is None else [leg for n in request.legs if (leg := stream.legs.get(n)) is not None]
        for leg in legs:
            self.steps.remove(leg)
            leg.stream.add_end(leg)
        if stream is not None and legs:
            stream.send()
        call.send(step_pb2.AbortLegsResponse(aborted_legs=len(legs)).SerializeToString())
        call.finish()
