"""Legs by contract 1: a call for each leg, a message for each token. For measuring releases from before contract 2.

Owns `Prefill` and `Decode` of a fake worker. Messages of tokens are put together by hand: there is one for each token.
"""

from __future__ import annotations

import time

from benchmarks.peers.grpc_wire import GrpcServer, Method, ServerCall
from benchmarks.peers.protobuf import varint
from benchmarks.peers.workers.steps import OpenStream
from benchmarks.peers.workers.tandem_worker import FakeWorker, end_with, finish_of
from tandem.api.decode.v1 import decode_service_pb2
from tandem.api.prefill.v1 import prefill_service_pb2
from tandem.api.types.v1 import leg_pb2

PREFILL = "/tandem.api.prefill.v1.PrefillService/Prefill"
DECODE = "/tandem.api.decode.v1.DecodeService/Decode"
PROGRESS = decode_service_pb2.DecodeResponse(
    progress=leg_pb2.LegProgress(phase=leg_pb2.LEG_PHASE_DECODING)
).SerializeToString()
TOKENS_TAG, INDEX_TAG, IDS_TAG = b"\x1a", b"\x08", b"\x12"


def tokens_message(index: int, token_ids: bytes) -> bytes:
    """A DecodeResponse with tokens, of which `token_ids` are the packed ids."""
    tokens = INDEX_TAG + varint(index) + IDS_TAG + varint(len(token_ids)) + token_ids
    return TOKENS_TAG + varint(len(tokens)) + tokens


class Leg(OpenStream):
    """A decode leg and its call."""

    __slots__ = ("call", "prompt_tokens")

    def __init__(self, call: ServerCall, serial: int | None, leg: leg_pb2.LegRequest, total: int, now_s: float) -> None:
        super().__init__(serial, total, now_s)
        self.call = call
        self.prompt_tokens = len(leg.token_ids)


class Contract1Worker(FakeWorker):
    """A worker whose legs are calls."""

    def methods(self) -> dict[str, Method]:
        """Its role's method, and what all workers answer."""
        own: dict[str, Method] = {PREFILL: self._prefill} if self.is_prefill else {DECODE: self._decode}
        return {**super().methods(), **own}

    def on_step(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        """A message for each leg."""
        connections: set[GrpcServer] = set()
        for leg in due:
            assert isinstance(leg, Leg)
            self._give_tokens(leg)
            connections.add(leg.call.connection)
        for leg in silent:
            assert isinstance(leg, Leg)
            leg.call.send(PROGRESS)
            connections.add(leg.call.connection)
        for connection in connections:
            connection.flush()

    def _give_tokens(self, leg: Leg) -> None:
        count = leg.take(self.tokens_at_once)
        ids = b"".join(map(varint, self.answer_ids(leg, count)))
        leg.call.send(tokens_message(leg.sent, ids))
        leg.sent += count
        if leg.sent >= leg.total:
            finish = finish_of(leg, leg.prompt_tokens)
            leg.call.send(decode_service_pb2.DecodeResponse(finish=finish).SerializeToString())
            leg.call.finish()

    def _decode(self, call: ServerCall, message: bytes) -> None:
        request = decode_service_pb2.DecodeRequest.FromString(message).leg
        problem = self.problem_of(request)
        if problem is not None:
            return end_with(call, problem)
        serial = self.words.serial_of_ids(request.token_ids)
        leg = Leg(call, serial, request, self.tokens_of(request), time.monotonic())
        call.on_cancel = lambda: self.steps.remove(leg)
        call.send(decode_service_pb2.DecodeResponse(accepted=self.accepted()).SerializeToString())
        return self.steps.add(leg)

    def _prefill(self, call: ServerCall, message: bytes) -> None:
        """The first token and the hand-over, at once."""
        request = prefill_service_pb2.PrefillRequest.FromString(message).leg
        problem = self.problem_of(request)
        if problem is not None:
            return end_with(call, problem)
        leg = Leg(call, None, request, 1, time.monotonic())
        response = prefill_service_pb2.PrefillResponse
        call.send(response(accepted=self.accepted()).SerializeToString())
        tokens = leg_pb2.LegTokens(index=0, token_ids=self.answer_ids(leg, 1))
        call.send(response(tokens=tokens).SerializeToString())
        leg.sent = 1
        call.send(response(finish=finish_of(leg, leg.prompt_tokens)).SerializeToString())
        return call.finish()
