"""The fake workers of the peers benchmark follow their protocols, checked with gRPC and HTTP clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from tandem_registry.app import RegistryApp
from tandem_registry.config import RegistryConfig

from benchmarks.peers.grpc_wire import GrpcServer, Method, ServerCall
from benchmarks.peers.words import Words
from benchmarks.peers.workers.contract1 import Contract1Worker
from benchmarks.peers.workers.contract2 import Contract2Worker
from benchmarks.peers.workers.http_fleet import HttpFleet
from benchmarks.peers.workers.listening import Listeners
from benchmarks.peers.workers.registering import Registrations
from benchmarks.peers.workers.steps import Pace
from benchmarks.peers.workers.tandem_worker import FakeWorker, capabilities
from tandem.api.decode.v1 import decode_service_pb2 as decode1_pb2
from tandem.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub as Decode1Stub
from tandem.api.decode.v2 import decode_service_pb2 as decode2_pb2
from tandem.api.decode.v2.decode_service_pb2_grpc import DecodeServiceStub as Decode2Stub
from tandem.api.prefill.v1 import prefill_service_pb2 as prefill1_pb2
from tandem.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub as Prefill1Stub
from tandem.api.prefill.v2 import prefill_service_pb2 as prefill2_pb2
from tandem.api.prefill.v2.prefill_service_pb2_grpc import PrefillServiceStub as Prefill2Stub
from tandem.api.registry.v1 import registry_service_pb2
from tandem.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from tandem.api.types.v1 import generation_pb2, leg_pb2, worker_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v1 import worker_service_pb2
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.api.worker.v2 import step_service_pb2 as step_pb2
from tandem.api.worker.v2.step_service_pb2_grpc import StepServiceStub
from tandem.testing.eventually import assert_eventually

MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
WORDS = Words.of_model(MODEL)
EPOCH = 42
PREFILL, DECODE = worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE
QUICK = Pace(0.001)
LENGTH, ABORTED = generation_pb2.FINISH_REASON_LENGTH, generation_pb2.FINISH_REASON_ABORTED


@asynccontextmanager
async def listening(methods: dict[str, Method]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server with these handlers."""
    listeners = Listeners()
    port = await listeners.open(partial(GrpcServer, methods))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await listeners.close()


@asynccontextmanager
async def serving(
    kind: type[FakeWorker], role: Any = DECODE, pace: Pace = QUICK
) -> AsyncIterator[tuple[FakeWorker, grpc.aio.Channel]]:
    """A fake worker and a channel to it."""
    identity = worker_pb2.Worker(worker_id="decode-0", epoch=EPOCH, role=role)
    worker = kind(identity, WORDS, pace, [])
    async with listening(worker.methods()) as channel:
        yield worker, channel


def leg(max_tokens: int = 5, epoch: int = EPOCH, serial: int = 9) -> leg_pb2.LegRequest:
    """A leg of a prompt with a serial number."""
    prompt = [WORDS.ids[WORDS.digit_by_text[word]] for word in WORDS.spell(serial)]
    request = leg_pb2.LegRequest(request_id="r", attempt=1, worker_epoch=epoch, model="m", token_ids=[0, *prompt, 1])
    request.stopping.max_tokens = max_tokens
    request.bootstrap.host, request.bootstrap.port, request.bootstrap.room = "127.0.0.1", 1, 1
    return request


def reason_of(failure: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(failure)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return str(info.reason)


class Steps:
    """A step stream, read message by message."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: Any = StepServiceStub(channel)
        self.call: grpc.aio.UnaryStreamCall[Any, step_pb2.StreamStepsResponse] = self.stub.StreamSteps(
            step_pb2.StreamStepsRequest(leg_contract=2, worker_epoch=EPOCH, frontend_id="test")
        )
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, leg2_pb2.LegEnd] = {}

    async def _next(self) -> step_pb2.StreamStepsResponse:
        step = await self.call.read()
        assert isinstance(step, step_pb2.StreamStepsResponse)
        return step

    async def open(self) -> int:
        first = await self._next()
        assert first == step_pb2.StreamStepsResponse(stream_id=first.stream_id)
        assert first.stream_id
        return int(first.stream_id)

    async def read(self) -> step_pb2.StreamStepsResponse:
        """The next step, which must fit what came before it."""
        step = await self._next()
        counts = step.counts or [1] * len(step.legs)
        assert len(step.legs) == len(step.indices) == len(counts)
        assert sum(counts) == len(step.token_ids)
        at = 0
        for number, index, count in zip(step.legs, step.indices, counts, strict=True):
            came = self.tokens.setdefault(number, [])
            assert index == len(came)
            assert number not in self.ends
            came += step.token_ids[at : at + count]
            at += count
        for end in step.ends:
            assert end.leg not in self.ends
            self.ends[end.leg] = end
        return step


async def test_steps_carry_all_legs_of_a_stream_together() -> None:
    async with serving(Contract2Worker) as (worker, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        request = decode2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=1, request=leg(5))
        request.legs.add(leg=2, request=leg(3))
        response = await stub.StartLegs(request)
        assert [result.accepted.worker_id for result in response.results] == ["decode-0"] * 2
        first = await steps.read()
        assert list(first.legs) == [1, 2]
        while len(steps.ends) < 2:
            await steps.read()
        assert {number: len(tokens) for number, tokens in steps.tokens.items()} == {1: 5, 2: 3}
        assert {token for tokens in steps.tokens.values() for token in tokens} <= set(WORDS.ids)
        finish = steps.ends[1].finish
        assert (finish.reason, finish.usage.prompt_tokens, finish.usage.completion_tokens) == (LENGTH, 5, 5)
        assert worker.steps.open_streams == 0
        steps.call.cancel()


async def test_several_tokens_of_a_leg_in_one_step_are_counted() -> None:
    async with serving(Contract2Worker, pace=Pace(0.001, tokens_per_step=4)) as (_, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        request = decode2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=1, request=leg(6))
        await stub.StartLegs(request)
        assert list((await steps.read()).counts) == [4]
        last = await steps.read()
        assert list(last.counts) == [2]
        assert last.ends[0].finish.reason == LENGTH
        steps.call.cancel()


async def test_an_aborted_leg_ends_once_and_others_go_on() -> None:
    async with serving(Contract2Worker) as (worker, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        number = await steps.open()
        request = decode2_pb2.StartLegsRequest(stream_id=number)
        request.legs.add(leg=1, request=leg(100_000))
        request.legs.add(leg=2, request=leg(20))
        await stub.StartLegs(request)
        await steps.read()
        abort = step_pb2.AbortLegsRequest(stream_id=number, legs=[1, 7])
        assert (await steps.stub.AbortLegs(abort)).aborted_legs == 1
        while len(steps.ends) < 2:
            await steps.read()
        assert steps.ends[1].finish.reason == ABORTED
        assert steps.ends[1].finish.usage.completion_tokens == len(steps.tokens[1])
        assert steps.ends[2].finish.reason == LENGTH
        assert (await steps.stub.AbortLegs(abort)).aborted_legs == 0
        assert worker.steps.open_streams == 0
        steps.call.cancel()


async def test_a_silent_leg_is_called_alive_between_its_tokens() -> None:
    async with serving(Contract2Worker, pace=Pace(0.5, step_s=0.01)) as (_, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        request = decode2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=3, request=leg(2))
        await stub.StartLegs(request)
        messages = [await steps.read() for _ in range(3)]
        assert [list(step.legs) for step in messages] == [[3], [], [3]]
        assert list(messages[1].alive) == [3]
        steps.call.cancel()


async def test_a_frontend_that_goes_ends_its_legs() -> None:
    async with serving(Contract2Worker) as (worker, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        request = decode2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=1, request=leg(100_000))
        await stub.StartLegs(request)
        assert worker.steps.open_streams == 1
        steps.call.cancel()
        await assert_eventually(lambda: worker.steps.open_streams == 0)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.StartLegs(request)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("contract", "epoch", "reason", "words"),
    [(1, EPOCH, "NOT_SUPPORTED", ("leg contract 2", "speaks 1")), (2, 7, "STALE_EPOCH", ("42", "7"))],
)
async def test_a_stream_of_another_contract_or_epoch_is_refused(
    contract: int, epoch: int, reason: str, words: tuple[str, str]
) -> None:
    async with serving(Contract2Worker) as (_, channel):
        stub: Any = StepServiceStub(channel)
        call = stub.StreamSteps(step_pb2.StreamStepsRequest(leg_contract=contract, worker_epoch=epoch))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        assert reason_of(failure.value) == reason
        assert all(word in str(failure.value.details()) for word in words)


async def test_legs_are_refused_one_by_one() -> None:
    async with serving(Contract2Worker) as (_, channel):
        steps, stub = Steps(channel), Decode2Stub(channel)
        request = decode2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=1, request=leg(epoch=7))
        request.legs.add(leg=2, request=leg(1))
        results = (await stub.StartLegs(request)).results
        assert [result.WhichOneof("result") for result in results] == ["refused", "accepted"]
        await steps.read()
        assert set(steps.ends) == {2}
        steps.call.cancel()


async def test_a_prefill_leg_is_one_token_and_its_end() -> None:
    async with serving(Contract2Worker, PREFILL) as (_, channel):
        steps, stub = Steps(channel), Prefill2Stub(channel)
        request = prefill2_pb2.StartLegsRequest(stream_id=await steps.open())
        request.legs.add(leg=1, request=leg(50))
        assert (await stub.StartLegs(request)).results[0].HasField("accepted")
        step = await steps.read()
        assert (list(step.legs), len(step.token_ids), step.ends[0].finish.reason) == ([1], 1, LENGTH)
        steps.call.cancel()


async def test_contract_1_streams_a_message_for_each_token() -> None:
    async with serving(Contract1Worker) as (_, channel):
        stub: Any = Decode1Stub(channel)
        events = [event async for event in stub.Decode(decode1_pb2.DecodeRequest(leg=leg(300)))]
    assert events[0].accepted.epoch == EPOCH
    assert [event.tokens.index for event in events[1:-1]] == list(range(300))
    assert all(event.tokens.token_ids[0] in WORDS.ids for event in events[1:-1])
    assert events[-1].finish.usage.completion_tokens == 300


async def test_contract_1_prefill_is_one_token_and_its_end() -> None:
    async with serving(Contract1Worker, PREFILL) as (_, channel):
        stub: Any = Prefill1Stub(channel)
        events = [event async for event in stub.Prefill(prefill1_pb2.PrefillRequest(leg=leg(300)))]
    assert [event.WhichOneof("event") for event in events] == ["accepted", "tokens", "finish"]


async def test_contract_1_refuses_another_epoch() -> None:
    async with serving(Contract1Worker) as (_, channel):
        stub: Any = Decode1Stub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Decode(decode1_pb2.DecodeRequest(leg=leg(epoch=7))).read()
        assert reason_of(failure.value) == "STALE_EPOCH"


async def test_a_worker_keeps_how_long_each_request_waited() -> None:
    async with serving(Contract1Worker) as (worker, channel):
        stub: Any = Decode1Stub(channel)
        async for _ in stub.Decode(decode1_pb2.DecodeRequest(leg=leg(2, serial=77))):
            pass
        [(serial, wait_s)] = worker.steps._waits
        assert serial == 77
        assert 0 <= wait_s < 5


async def test_health_and_load_are_answered() -> None:
    async with serving(Contract2Worker) as (_, channel):
        health: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        stub: Any = WorkerServiceStub(channel)
        load = stub.WatchLoad(worker_service_pb2.WatchLoadRequest(interval_ms=10))
        assert [(await load.read()).sequence for _ in range(3)] == [1, 2, 3]
        load.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.FlushCache(worker_service_pb2.FlushCacheRequest())
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_large_messages_pass_both_windows() -> None:
    def echo(call: ServerCall, message: bytes) -> None:
        call.send(message)
        call.finish()

    async with listening({"/a.B/Echo": echo}) as channel:
        method: Any = channel.unary_unary("/a.B/Echo")
        for size in (0, 1, 16_384, 65_530, 3_000_000):
            assert await method(b"x" * size) == b"x" * size


async def test_workers_are_entered_in_a_real_registry(tmp_path: Path) -> None:
    async with RegistryApp.open(RegistryConfig(announce_file=tmp_path / "a.json")) as app:
        facts = capabilities(MODEL, "tandem-demo", DECODE)
        worker = worker_pb2.Worker(
            worker_id="decode-0",
            epoch=EPOCH,
            role=DECODE,
            address="127.0.0.1:1",
            capabilities=facts,
            state=worker_pb2.WORKER_STATE_SERVING,
            leg_contract=2,
        )
        registrations = Registrations(app.address)
        try:
            await registrations.open([worker])
            async with grpc.aio.insecure_channel(app.address) as channel:
                stub: Any = RegistryServiceStub(channel)
                listed = (await stub.List(registry_service_pb2.ListRequest())).workers
            assert [one.worker.worker_id for one in listed] == ["decode-0"]
            assert listed[0].worker.capabilities == facts
        finally:
            await registrations.close()


async def test_http_workers_stream_what_openai_clients_read() -> None:
    fleet = HttpFleet(WORDS, QUICK)
    ports = await fleet.open({"prefill": 1, "decode": 1, "model": str(MODEL), "model_name": "tandem-demo"})
    prompt = " ".join(["once", *WORDS.spell(5)])
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 40, "stream": True}
    async with httpx.AsyncClient(timeout=10) as client:
        base = f"http://127.0.0.1:{ports['decode'][0]}"
        assert (await client.get(f"{base}/health")).status_code == 200
        lines = (await client.post(f"{base}/v1/chat/completions", json=body)).text.split("\n\n")
        prefill = f"http://127.0.0.1:{ports['prefill'][0]}"
        assert (await client.post(f"{prefill}/v1/chat/completions", json=body)).status_code == 200
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text.count(" ") == 40
    assert set(text.split()) <= set(WORDS.texts)
    assert events[-1]["usage"]["completion_tokens"] == 40
    assert [serial for serial, _ in fleet.waits] == [5]
    await fleet.listeners.close()
