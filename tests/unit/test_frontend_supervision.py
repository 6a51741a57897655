"""Both legs of an attempt under every kind of failure, on calls that are played."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from frontend_workers import aggregated, decode, prefill
from played_calls import ACCEPTED, PlayedCall
from tandem_frontend.dispatch import Dispatched
from tandem_frontend.routing.candidates import Route
from tandem_frontend.supervision import Attempt, Bounds

from tandem.api.decode.v1.decode_service_pb2 import DecodeResponse
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import InvalidRequest, LegFailed, ServiceError, StaleEpoch, TandemError
from tandem.model.worker import Worker
from tandem.rpc.leg_calls import LegCall

FINISH = DecodeResponse(finish=leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH))
ABORTED = DecodeResponse(finish=leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_ABORTED))
ROOM = 42


def tokens(index: int, *token_ids: int) -> DecodeResponse:
    return DecodeResponse(tokens=leg_pb2.LegTokens(index=index, token_ids=token_ids))


def progress(phase: leg_pb2.LegPhase.ValueType) -> DecodeResponse:
    return DecodeResponse(progress=leg_pb2.LegProgress(phase=phase))


def attempt(
    decode_call: PlayedCall, prefill_call: PlayedCall | None, accept_s: float = 1.0, silence_s: float = 1.0
) -> Attempt:
    route = Route(decode(), prefill()) if prefill_call else Route(aggregated(), None)
    dispatched = Dispatched(
        route, 1, ROOM if prefill_call else 0, cast("LegCall", decode_call), cast("LegCall | None", prefill_call)
    )

    async def is_lost(worker: Worker) -> bool:
        return False

    return Attempt(dispatched, Bounds(accept_s, silence_s), is_lost)


async def drain(attempt: Attempt) -> list[int]:
    async with attempt:
        return [token for batch in [t async for t in attempt.tokens()] for token in batch.token_ids]


async def test_both_accounts_are_there_at_the_end() -> None:
    d, p = PlayedCall(ACCEPTED, tokens(0, 5), tokens(1, 6, 7), FINISH), PlayedCall(ACCEPTED, tokens(0, 5), FINISH)
    whole = attempt(d, p)
    assert await drain(whole) == [5, 6, 7]
    assert whole.decode_finish is not None
    assert whole.prefill_finish is not None
    assert d.cancelled.is_set()
    assert p.cancelled.is_set()


async def test_aggregated_needs_no_prefill() -> None:
    whole = attempt(PlayedCall(ACCEPTED, tokens(0, 5), FINISH), None)
    assert await drain(whole) == [5]
    assert whole.prefill_finish is None


@pytest.mark.parametrize(
    ("broken", "phase"),
    [([], "dispatched"), ([ACCEPTED], "bootstrapping"), ([ACCEPTED, tokens(0, 5)], "transferring")],
    ids=["dispatched", "bootstrapping", "transferring"],
)
async def test_a_broken_prefill_leg_ends_decodes(broken: list[Any], phase: str) -> None:
    d, p = PlayedCall(ACCEPTED), PlayedCall(*broken, ServiceError("connection reset"))
    with pytest.raises(LegFailed) as failed:
        await asyncio.wait_for(drain(attempt(d, p)), 1)
    assert failed.value.metadata == {
        "leg": "prefill", "worker": "prefill-0", "phase": phase, "attempt": "1", "room": str(ROOM)
    }  # fmt: skip
    assert d.cancelled.is_set()


@pytest.mark.parametrize(
    ("broken", "phase"),
    [([], "dispatched"), ([ACCEPTED], "bootstrapping"), ([ACCEPTED, tokens(0, 5)], "decoding")],
    ids=["dispatched", "bootstrapping", "decode"],
)
async def test_a_broken_decode_leg_ends_prefills(broken: list[Any], phase: str) -> None:
    d, p = PlayedCall(*broken, ServiceError("connection reset")), PlayedCall(ACCEPTED)
    with pytest.raises(LegFailed) as failed:
        await asyncio.wait_for(drain(attempt(d, p)), 1)
    assert failed.value.metadata["leg"] == "decode"
    assert failed.value.metadata["phase"] == phase
    assert p.cancelled.is_set()


async def test_a_prefill_leg_may_break_once_decode_has_spoken() -> None:
    d, p = PlayedCall(ACCEPTED, tokens(0, 5)), PlayedCall(ACCEPTED, tokens(0, 5))
    whole = attempt(d, p)
    got = []
    async with whole:
        async for batch in whole.tokens():
            got += batch.token_ids
            if len(got) == 1:
                p.say(ServiceError("killed"))
                d.say(tokens(1, 6))
                d.say(FINISH)
    assert got == [5, 6]
    assert whole.decode_finish is not None


async def test_a_worker_that_never_answers_is_bounded() -> None:
    with pytest.raises(LegFailed, match=r"no answer within 0\.05 s"):
        await drain(attempt(PlayedCall(), PlayedCall(ACCEPTED), accept_s=0.05))
    with pytest.raises(LegFailed, match=r"prefill.*no answer within 0\.05 s"):
        await drain(attempt(PlayedCall(ACCEPTED), PlayedCall(), accept_s=0.05))


async def test_a_silent_leg_is_bounded_in_every_phase() -> None:
    taken, decoding = [ACCEPTED], [ACCEPTED, tokens(0, 5)]
    for decode_events, prefill_events, leg in (
        (taken, [ACCEPTED, FINISH], "decode"),
        (decoding, [ACCEPTED, FINISH], "decode"),
        (taken, taken, "prefill"),
        (taken, decoding, "prefill"),
    ):
        d, p = PlayedCall(*decode_events), PlayedCall(*prefill_events)
        silent = {"decode": d, "prefill": p}[leg]
        with pytest.raises(LegFailed, match=rf"{leg} leg .* nothing heard for 0\.1 s"):
            await drain(attempt(d, p, silence_s=0.1) if silent is d else _kept_talking(d, p))
        assert d.cancelled.is_set()
        assert p.cancelled.is_set()


def _kept_talking(d: PlayedCall, p: PlayedCall) -> Attempt:
    """Decode waits for prefill and says so."""

    async def talk() -> None:
        while not d.cancelled.is_set():
            d.say(progress(leg_pb2.LEG_PHASE_BOOTSTRAPPING))
            await asyncio.sleep(0.02)

    whole = attempt(d, p, silence_s=0.1)
    whole_task = asyncio.get_running_loop().create_task(talk())
    whole_task.add_done_callback(lambda done: done.result())
    return whole


async def test_progress_is_a_sign_of_life() -> None:
    d = PlayedCall(ACCEPTED)
    whole = attempt(d, None, silence_s=0.2)
    reader = asyncio.create_task(drain(whole))
    for _ in range(10):
        await asyncio.sleep(0.05)
        d.say(progress(leg_pb2.LEG_PHASE_PREFILLING))
    d.say(tokens(0, 5))
    d.say(FINISH)
    assert await reader == [5]


async def test_a_reader_that_pauses_is_not_a_silent_leg() -> None:
    """A slow client stops the reading; the leg's words wait in the connection."""
    d = PlayedCall(ACCEPTED, tokens(0, 5), tokens(1, 6), FINISH)
    got = []
    async with attempt(d, None, silence_s=0.05) as whole:
        async for batch in whole.tokens():
            got += batch.token_ids
            await asyncio.sleep(0.15)
    assert got == [5, 6]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_known_to_be_gone_ends_the_attempt_at_once(role: str) -> None:
    d, p = PlayedCall(ACCEPTED), PlayedCall(ACCEPTED)
    whole = attempt(d, p, silence_s=60)
    reader = asyncio.create_task(drain(whole))
    await asyncio.sleep(0.02)
    whole.lose(decode() if role == "decode" else prefill(), "started again")
    with pytest.raises(LegFailed, match="started again") as failed:
        await asyncio.wait_for(reader, 1)
    assert failed.value.metadata["leg"] == role
    assert whole.failed_worker == (decode() if role == "decode" else prefill())


async def test_a_refused_value_is_the_clients_and_not_the_legs() -> None:
    d, p = PlayedCall(ACCEPTED), PlayedCall(ACCEPTED, InvalidRequest("token_ids", "is too long"))
    with pytest.raises(InvalidRequest) as refused:
        await drain(attempt(d, p))
    assert refused.value.field == "token_ids"


async def test_a_restarted_worker_is_the_legs_failure() -> None:
    stale = StaleEpoch("another epoch", worker="decode-0", expected=7, actual=8)
    with pytest.raises(LegFailed) as failed:
        await drain(attempt(PlayedCall(stale), PlayedCall(ACCEPTED)))
    assert failed.value.metadata["actual"] == "8"
    assert failed.value.metadata["phase"] == "dispatched"


async def test_a_lost_token_is_a_failure() -> None:
    with pytest.raises(LegFailed, match="tokens came at 2, not at 1"):
        await drain(attempt(PlayedCall(ACCEPTED, tokens(0, 5), tokens(2, 6)), None))


async def test_a_stream_without_a_finish_is_a_failure() -> None:
    with pytest.raises(LegFailed, match="without a finish"):
        await drain(attempt(PlayedCall(ACCEPTED, tokens(0, 5), None), None))


async def test_an_aborted_prefill_leg_ends_the_attempt() -> None:
    d, p = PlayedCall(ACCEPTED), PlayedCall(ACCEPTED, ABORTED)
    with pytest.raises(TandemError, match="aborted") as failed:
        await asyncio.wait_for(drain(attempt(d, p)), 1)
    assert failed.value.reason == "ABORTED"


async def test_leaving_early_ends_both_legs() -> None:
    d, p = PlayedCall(ACCEPTED, tokens(0, 5)), PlayedCall(ACCEPTED)
    async with attempt(d, p) as whole:
        async for _ in whole.tokens():
            break
    assert d.cancelled.is_set()
    assert p.cancelled.is_set()


async def test_cancelling_the_reader_is_no_failure_of_a_leg() -> None:
    d, p = PlayedCall(ACCEPTED), PlayedCall(ACCEPTED)
    reader = asyncio.create_task(drain(attempt(d, p)))
    await asyncio.sleep(0.05)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert d.cancelled.is_set()
    assert p.cancelled.is_set()


async def test_a_cancellation_while_an_attempt_ends_is_not_lost() -> None:
    leaving = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            leaving.set()
            await asyncio.sleep(0.1)

    async def go_on() -> str:
        async with attempt(PlayedCall(ACCEPTED), PlayedCall(ACCEPTED)) as whole:
            assert whole._prefill_task is not None
            whole._prefill_task.cancel()
            whole._prefill_task = asyncio.create_task(slow_to_end())
            await asyncio.sleep(0)
        return "for nobody"

    request = asyncio.create_task(go_on())
    await leaving.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
