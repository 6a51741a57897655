"""Both legs of an attempt under every kind of failure, on calls that are played."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from frontend_workers import aggregated, decode, prefill
from played_calls import ACCEPTED, PlayedCall
from tandem_frontend.dispatch import Dispatched
from tandem_frontend.routing.candidates import Route
from tandem_frontend.supervision import Attempt

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


def attempt(decode_call: PlayedCall, prefill_call: PlayedCall | None, accept_timeout_s: float = 1.0) -> Attempt:
    route = Route(decode(), prefill()) if prefill_call else Route(aggregated(), None)
    dispatched = Dispatched(
        route, 1, ROOM if prefill_call else 0, cast("LegCall", decode_call), cast("LegCall | None", prefill_call)
    )

    async def is_lost(worker: Worker) -> bool:
        return False

    return Attempt(dispatched, accept_timeout_s, is_lost)


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
    [([], "dispatch"), ([ACCEPTED], "bootstrap"), ([ACCEPTED, tokens(0, 5)], "transfer")],
    ids=["dispatch", "bootstrap", "transfer"],
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
    [([], "dispatch"), ([ACCEPTED], "bootstrap"), ([ACCEPTED, tokens(0, 5)], "decode")],
    ids=["dispatch", "bootstrap", "decode"],
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
        await drain(attempt(PlayedCall(), PlayedCall(ACCEPTED), accept_timeout_s=0.05))
    with pytest.raises(LegFailed, match=r"prefill.*no answer within 0\.05 s"):
        await drain(attempt(PlayedCall(ACCEPTED), PlayedCall(), accept_timeout_s=0.05))


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
    assert failed.value.metadata["phase"] == "dispatch"


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
