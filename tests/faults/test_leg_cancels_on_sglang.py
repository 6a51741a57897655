"""Requests of the real engine that are given up, in every phase and by every way, and schedulers that are killed.

One pair of engines behind an edge, started once. The phase is held while the request is given up, so that both engines
let it go where it stands. A page may only come back when no engine can write into it any more: what is asked next shows
token by token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tandem.api.worker.v1 import worker_service_pb2 as worker_pb
from tandem.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tandem.client import calls
from tandem.errors import LegFailed, RequestAborted
from tandem.rpc.channels import open_channel
from tandem.testing.eventually import assert_eventually
from tests.faults.support.history import now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S
from tests.faults.support.leg_report import LINES
from tests.faults.support.sglang_holds import MARKS
from tests.faults.support.sglang_legs import (
    IN_TURN,
    ON_SGLANG,
    TOKENS,
    SglangFleet,
    Stream,
    ended,
    prompt_of,
    scheduler_of,
    sglang_fleet,
)

pytestmark = ON_SGLANG

Answers = dict[tuple[int, ...], list[int]]
WITHIN_S = IDLE_WITHIN_S + BUSY_MACHINE_S
DEADLINE_S = 2.5
FAILS_WITHIN_S = 2.0
COMPANY = ("decoding", "transferring")
"""Whose prompts are asked beside the one that was given up."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangFleet]:
    async with sglang_fleet(tmp_path_factory.mktemp("cancels-on-sglang"), prefill=1, decode=1) as fleet:
        await fleet.add("edge", "edge", {"registry": fleet.registries[0].address})
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def answers(fleet: SglangFleet) -> Answers:
    """What the pair answers to each prompt when nothing is given up."""
    return await fleet.answers(prompt_of(phase) for phase in IN_TURN)


async def by_the_client(fleet: SglangFleet, stream: Stream) -> float:
    assert stream.task is not None
    given_up_s = now_s()
    stream.task.cancel()
    await asyncio.wait({stream.task})
    return given_up_s


async def by_the_deadline(fleet: SglangFleet, stream: Stream) -> float:
    end_s = stream.asked.start_s + DEADLINE_S
    assert now_s() < end_s, "void: the deadline passed before it was held"
    await ended([stream])
    assert stream.asked.failure is not None
    assert stream.asked.failure.reason == "DEADLINE_EXCEEDED"
    return end_s


async def by_an_abort_at_decode(fleet: SglangFleet, stream: Stream) -> float:
    given_up_s = await _abort(fleet, stream, "decode-0")
    assert (stream.asked.finish_count, stream.asked.failure) == (1, None), stream.asked.summary()
    assert len(stream.asked.tokens) < TOKENS, "void: it was over before it was given up"
    return given_up_s


async def by_an_abort_at_prefill(fleet: SglangFleet, stream: Stream) -> float:
    given_up_s = await _abort(fleet, stream, "prefill-0")
    assert isinstance(stream.asked.failure, RequestAborted), stream.asked.summary()
    return given_up_s


async def _abort(fleet: SglangFleet, stream: Stream, name: str) -> float:
    """At one worker only: the other leg must follow."""
    async with open_channel(fleet.processes[name].address) as channel:
        stub: Any = WorkerServiceStub(channel)
        epoch = (await stub.GetCapabilities(worker_pb.GetCapabilitiesRequest())).worker.epoch
        given_up_s = now_s()
        response = await stub.Abort(worker_pb.AbortRequest(worker_epoch=epoch, request_id=stream.request_id))
    assert response.aborted_legs == 1
    await ended([stream])
    return given_up_s


WAYS: dict[str, tuple[Callable[[SglangFleet, Stream], Awaitable[float]], float | None]] = {
    "client": (by_the_client, None),
    "deadline": (by_the_deadline, DEADLINE_S),
    "abort": (by_an_abort_at_decode, None),
    "abort at prefill": (by_an_abort_at_prefill, None),
}


@pytest.mark.parametrize("phase", IN_TURN)
@pytest.mark.parametrize("way", WAYS)
async def test_a_request_that_is_given_up_leaves_both_engines_and_no_trace(
    fleet: SglangFleet, answers: Answers, way: str, phase: str
) -> None:
    give_up, timeout_s = WAYS[way]
    if (way, phase) == ("abort at prefill", "decoding"):
        pytest.skip("prefill has no leg any more")
    async with held(fleet, phase):
        stream = fleet.begin(prompt_of(phase), phase, timeout_s)
        await assert_eventually(lambda: fleet.is_in_phase(stream, now_s()), within_s=20, what=f"a hold in {phase}")
        given_up_s = await give_up(fleet, stream)
        await assert_let_go(fleet, phase, len(stream.asked.prompt), given_up_s)
        LINES.append(f"SGLang: given up by {way}, {phase}: both engines idle after {now_s() - given_up_s:.2f} s")
    await assert_no_trace(fleet, phase, answers)


async def test_a_client_that_leaves_the_edge_leaves_both_engines(fleet: SglangFleet, answers: Answers) -> None:
    request = {
        "token_ids": {"ids": prompt_of("transferring")},
        "sampling": {"temperature": 0.0},
        "stopping": {"max_tokens": TOKENS, "ignore_eos": True},
    }

    async def read() -> None:
        async with (
            httpx.AsyncClient(base_url=f"http://{fleet.processes['edge'].address}", timeout=30) as client,
            client.stream("POST", "/v1/generate", json=request) as response,
        ):
            assert response.status_code == 200, await response.aread()
            async for _ in response.aiter_lines():
                pass

    async with held(fleet, "transferring") as before:
        client = asyncio.create_task(read())
        await assert_eventually(lambda: len(fleet.holds.held()) > before, within_s=20, what="a hold")
        given_up_s = now_s()
        client.cancel()
        await asyncio.wait({client})
        assert client.cancelled(), "void: it was over before it was given up"
        await assert_let_go(fleet, "transferring", len(prompt_of("transferring")), given_up_s)
    await assert_no_trace(fleet, "transferring", answers)


@contextlib.asynccontextmanager
async def held(fleet: SglangFleet, phase: str) -> AsyncIterator[int]:
    """Both engines hold in that phase as long as the block; yields how much has been held before."""
    await fleet.assert_no_pages(WITHIN_S)
    await fleet.forget()
    before = len(fleet.holds.held())
    fleet.holds.begin("prefill-0", "decode-0", phases=(phase,))
    try:
        yield before
    finally:
        fleet.holds.end()


async def assert_let_go(fleet: SglangFleet, phase: str, prompt_tokens: int, given_up_s: float) -> None:
    """The hold is still there: it is the engines that let go, and not the hold that ends."""
    await fleet.assert_no_legs(max(0.0, given_up_s + WITHIN_S - now_s()))
    if phase != "transferring":
        await fleet.assert_no_pages(max(0.0, given_up_s + WITHIN_S - now_s()))
        return
    # Prefill stands in the middle of its writing, and decode keeps what it writes to from all others.
    await asyncio.sleep(0.2)
    load = (await fleet.loads())["decode-0"]
    assert load.kv_used_tokens == load.kv_transferring_tokens == prompt_tokens, load


async def assert_no_trace(fleet: SglangFleet, phase: str, answers: Answers) -> None:
    """Every page is back, and the same prompt, in company that fills the same pages, has the undisturbed answer."""
    await fleet.assert_no_pages(WITHIN_S)
    prompts = {prompt_of(phase), *(prompt_of(other) for other in COMPANY)}
    assert await fleet.answers(prompts) == {prompt: answers[prompt] for prompt in prompts}


async def test_a_scheduler_that_is_killed_ends_its_worker_and_fails_its_requests_typed(
    fleet: SglangFleet, answers: Answers
) -> None:
    """The last test: no worker is left to go on, and both engines are gone in the end."""
    streams = await fleet.in_every_phase("prefill-0")
    had = fleet.held_by(streams, "prefill-0", now_s())
    killed_s = await _kill_scheduler(fleet, "prefill-0")
    lost = [s for phase in MARKS if phase != "decoding" for s in had[phase]]
    await ended(lost)
    for asked in (stream.asked for stream in lost):
        assert asked.failure is not None, asked.summary()
        assert isinstance(asked.failure, LegFailed) or asked.failure.reason == "UNAVAILABLE", asked.summary()
        assert (asked.end_s or 0.0) - killed_s < FAILS_WITHIN_S + BUSY_MACHINE_S, asked.summary()
    (stays,) = had["decoding"]
    assert fleet.is_in_phase(stays, now_s()), f"its KV had been handed over: {stays.asked.summary()}"
    killed_s = await _kill_scheduler(fleet, "decode-0")
    await ended([stays])
    assert isinstance(stays.asked.failure, LegFailed), stays.asked.summary()
    assert (stays.asked.end_s or 0.0) - killed_s < FAILS_WITHIN_S + BUSY_MACHINE_S, stays.asked.summary()
    assert stays.asked.tokens == answers[stays.asked.prompt][: len(stays.asked.tokens)]
    await assert_eventually(lambda: _listed(fleet), lambda workers: not workers, what="an empty registry")


async def _kill_scheduler(fleet: SglangFleet, name: str) -> float:
    """Kill what runs the model, and see the worker end for that reason. Returns when it was killed."""
    worker = fleet.processes[name]
    killed_s = now_s()
    os.kill(scheduler_of(worker), signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await worker.wait_ended() == 1
    assert "scheduler was killed by SIGKILL" in (worker.last_words() or ""), worker.last_words()
    return killed_s


async def _listed(fleet: SglangFleet) -> list[str]:
    return [listed.worker.worker_id for listed in await calls.list_workers(fleet.registries[0].address)]
