"""A link over a real channel to a worker whose stream gRPC cannot make sense of: it opens another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from tandem_frontend.execution.worker_link import WorkerLink

from tandem.api.decode.v2.decode_service_pb2 import StartLegsRequest, StartLegsResponse
from tandem.api.types.v1 import leg_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.client.step_calls import WorkerCalls
from tandem.domain.worker import Worker
from tandem.rpc.channels import Channels
from tandem.service.awake_timers import AwakeTimers
from tandem.testing.eventually import assert_eventually
from tests.unit.support.frontend_workers import decode
from tests.unit.test_worker_link import ACCEPTED, BOUNDS, Heard

UNREAD = "a proxy's sentence (the reason of this error is malformed: the peer may run another release)"
WORDS = {
    "no step": (None, "worker decode-0 sent a step message that cannot be read: it may run another release"),
    "details of another code": (status_pb2.Status(code=13, message="x").SerializeToString(), UNREAD),
    "no details": (b"\xff\xff", UNREAD),
}


class Garbler:
    """A worker whose first stream says something unreadable, and whose others are whole."""

    def __init__(self, details: bytes | None) -> None:
        self.opened = 0
        self.may_garble = asyncio.Event()
        self._details = details

    async def steps(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.opened += 1
        is_first = self.opened == 1
        yield StreamStepsResponse(stream_id=self.opened).SerializeToString()
        await (self.may_garble.wait() if is_first else asyncio.sleep(0))
        if is_first and self._details is not None:
            trailing = (("grpc-status-details-bin", self._details),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy's sentence", trailing)
        while True:
            yield b"\xff\xff\xff" if is_first else StreamStepsResponse(alive=[1, 2]).SerializeToString()
            await asyncio.sleep(0.2)

    async def start(self, request: StartLegsRequest, context: Any) -> StartLegsResponse:
        return StartLegsResponse(results=[ACCEPTED for _ in request.legs])

    async def abort(self, request: bytes, context: Any) -> bytes:
        return b""

    async def serve(self) -> tuple[Any, int]:
        server = grpc.aio.server()
        of_steps: dict[str, Any] = {
            "StreamSteps": grpc.unary_stream_rpc_method_handler(self.steps),
            "AbortLegs": grpc.unary_unary_rpc_method_handler(self.abort),
        }
        of_decode = {
            "StartLegs": grpc.unary_unary_rpc_method_handler(
                self.start, StartLegsRequest.FromString, StartLegsResponse.SerializeToString
            )
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("tandem.api.worker.v2.StepService", of_steps),
                grpc.method_handlers_generic_handler("tandem.api.decode.v2.DecodeService", of_decode),
            )
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port


async def check_health(worker: Worker) -> bool:
    return True


@pytest.mark.parametrize(("details", "sentence"), WORDS.values(), ids=WORDS)
async def test_an_unreadable_message_breaks_one_stream(details: bytes | None, sentence: str) -> None:
    worker = Garbler(details)
    server, port = await worker.serve()
    timers, channels = AwakeTimers(), Channels(None)
    address = replace(decode(), address=f"127.0.0.1:{port}")
    link = WorkerLink(address, "f0", WorkerCalls(channels), BOUNDS, timers, check_health, asyncio.Semaphore(1))
    try:
        first = Heard()
        link.start(leg_pb2.LegRequest(request_id="r1"), first, None, ())
        await assert_eventually(lambda: first.accepted_count == 1)
        worker.may_garble.set()
        await assert_eventually(lambda: bool(first.ends))
        assert first.failure == sentence

        async def takes_a_leg() -> bool:
            heard = Heard()
            link.start(leg_pb2.LegRequest(request_id="r"), heard, None, ())
            await asyncio.sleep(0.1)
            return heard.accepted_count == 1 and not heard.ends

        await assert_eventually(takes_a_leg)
        assert worker.opened == 2
    finally:
        await link.close()
        timers.close()
        await channels.close()
        await server.stop(0)
