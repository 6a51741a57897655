"""Unreadable messages on a link: each leg still ends exactly once, and the stream is reopened."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from tandem_frontend.execution import worker_link

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.errors import LegFailed, TandemError
from tandem.rpc.status import DOMAIN, UNREADABLE
from tests.unit.test_worker_link import ACCEPTED, Scene, virtually

CORRUPT = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")


def status(detail: any_pb2.Any) -> status_pb2.Status:
    return status_pb2.Status(code=14, message="no room", details=[detail])


def packed(**metadata: str) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason="LEG_FAILED", metadata=metadata))
    return detail


def logprobs(number: int, *token_ids: int) -> leg2_pb2.LegLogprobs:
    return leg2_pb2.LegLogprobs(
        leg=number, logprobs=[generation_pb2.TokenLogprob(token_id=token_id) for token_id in token_ids]
    )


@pytest.mark.parametrize(
    ("detail", "sentence"),
    [
        (CORRUPT, f"no room ({UNREADABLE})"),
        (packed(message="m", self="s"), "no room"),
    ],
    ids=["corrupt", "metadata named as parameters"],
)
def test_an_unreadable_end_ends_the_leg(detail: any_pb2.Any, sentence: str) -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        scene.say(ends=[leg2_pb2.LegEnd(leg=leg.number, failure=status(detail))])
        await scene.settle()
        assert heard.failure == sentence
        assert scene.link.leg_count == 0

    virtually(play)


def test_a_sink_that_raises_on_its_finish_gets_a_failure() -> None:
    async def play(scene: Scene) -> None:
        (one, broken), (two, whole) = await scene.started(), await scene.started()
        broken.finish = lambda finish: 1 / 0  # type: ignore[assignment, method-assign]
        scene.say(ends=[leg2_pb2.LegEnd(leg=leg.number, finish=leg_pb2.LegFinish()) for leg in (one, two)])
        await scene.settle()
        assert broken.failure == "internal error in a leg: ZeroDivisionError"
        assert whole.ends == [leg_pb2.LegFinish()]

    virtually(play)


def test_an_unreadable_refusal_fails_one_leg_only() -> None:
    async def play(scene: Scene) -> None:
        refused = leg2_pb2.LegStartResult(refused=status(CORRUPT))
        scene.calls.answer = lambda start: refused if start.leg == 1 else ACCEPTED
        (_, first), (given_up, _), (_, third) = scene.start(), scene.start(), scene.start()
        scene.calls.may_answer.clear()
        await scene.settle()
        given_up.abort()
        scene.calls.may_answer.set()
        await scene.settle()
        assert first.failure == f"no room ({UNREADABLE})"
        assert (third.accepted_count, third.ends) == (1, [])
        assert scene.calls.aborted == [given_up.number], "accepted after it was given up"

    virtually(play)


def test_an_empty_start_result_is_a_failure_and_the_leg_is_aborted() -> None:
    async def play(scene: Scene) -> None:
        scene.calls.answer = lambda start: leg2_pb2.LegStartResult()
        leg, heard = scene.start()
        await scene.settle()
        assert "sent an unknown result for a leg" in heard.failure
        assert scene.calls.aborted == [leg.number]

    virtually(play)


def test_a_sink_that_raises_on_acceptance_affects_no_other_leg() -> None:
    async def play(scene: Scene) -> None:
        (_, broken), (_, whole) = scene.start(), scene.start()
        broken.accepted = lambda: 1 / 0  # type: ignore[assignment, method-assign]
        await scene.settle()
        assert broken.failure == "internal error in a leg: ZeroDivisionError"
        assert whole.accepted_count == 1

    virtually(play)


def test_a_start_call_that_raises_fails_its_legs() -> None:
    async def play(scene: Scene) -> None:
        def raise_(start: Any) -> Any:
            raise KeyError(99)

        scene.calls.answer = raise_
        _, heard = scene.start()
        await scene.settle()
        assert heard.failure == "unreadable message from worker decode-0 (KeyError: 99)"

    virtually(play)


@pytest.mark.parametrize("wrong", [None, ValueError("Code in Status proto (13) doesn't match status code (14)")])
def test_a_stream_is_reopened_after_any_error(wrong: Any) -> None:
    async def play(scene: Scene) -> None:
        (_, broken), (_, other) = await scene.started(), await scene.started()
        other.fail = lambda problem: 1 / 0  # type: ignore[assignment, method-assign]

        async def read() -> Any:
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

        scene.calls.streams[-1].read = read
        scene.say(alive=[])
        await asyncio.sleep(0.2)
        assert "unreadable message from worker" in broken.failure
        assert len(scene.calls.streams) == 2
        _, later = await scene.started()
        assert not later.ends

    virtually(play)


def test_a_stream_that_breaks_at_once_is_reopened_with_backoff() -> None:
    async def play(scene: Scene) -> None:
        for _ in range(300):
            await asyncio.sleep(0.1)
            scene.say(legs=[1])
        assert len(scene.calls.streams) < 60, "30 s, a second apart in the end"

    virtually(play)


@pytest.mark.parametrize(
    "wrong",
    [{"token_ids": [5]}, {"indices": [0]}, {"counts": [1]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_lists_without_legs_end_the_stream(wrong: dict[str, Any]) -> None:
    async def play(scene: Scene) -> None:
        _, heard = await scene.started()
        scene.say(**wrong)
        await scene.settle()
        assert "lists differ in length" in heard.failure

    virtually(play)


@pytest.mark.parametrize("token_ids", [(9,), (9, 9, 9, 9)])
@pytest.mark.parametrize("has_tokens", [True, False])
def test_a_wrong_number_of_log_probabilities_fails_the_leg(token_ids: tuple[int, ...], has_tokens: bool) -> None:
    async def play(scene: Scene) -> None:
        (one, wrong), (two, right) = await scene.started(), await scene.started()
        entries = [logprobs(one.number, *token_ids), logprobs(two.number, 8)]
        legs = [one.number, two.number, one.number] if has_tokens else [two.number]
        counts = [2, 1, 1] if has_tokens else [1]
        scene.say(
            legs=legs, indices=[0, 0, 2][: len(legs)], counts=counts, token_ids=[8] * sum(counts), logprobs=entries
        )
        await scene.settle()
        assert isinstance(wrong.ends[0], LegFailed)
        assert wrong.failure == f"received {len(token_ids)} log probabilities with {3 * has_tokens} tokens"
        assert (wrong.token_ids, right.token_ids, right.ends) == ([], [8], [])
        assert scene.calls.aborted == [one.number]

    virtually(play)


def test_unknown_legs_of_one_message_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        with caplog.at_level(logging.WARNING):
            scene.say(legs=[98, 98, leg.number], indices=[0, 1, 0], token_ids=[4, 4, 5], alive=range(90, 100))
            await scene.settle()
        assert sorted(scene.calls.aborted) == list(range(90, 100)), "each once"
        assert [record.getMessage() for record in caplog.records] == [
            "worker decode-0 runs 10 legs that this frontend has ended or did not start: aborting them there,"
            " no request is affected (leg numbers 98, 90, 91, 92, 93, ...)"
        ]
        assert heard.token_ids == [5]

    virtually(play)


def test_too_many_unknown_legs_end_the_stream() -> None:
    async def play(scene: Scene) -> None:
        _, heard = await scene.started()
        most = worker_link.UNKNOWN_LEGS_MAX
        scene.say(alive=range(1000, 1000 + most))
        await scene.settle()
        assert (len(scene.calls.aborted), heard.ends) == (most, [])
        scene.say(alive=range(1000, 1000 + most + 1))
        await scene.settle()
        assert isinstance(heard.ends[0], TandemError)
        assert heard.failure == (
            f"worker decode-0 listed more than {most} legs that this frontend did not start:"
            " another frontend may have the same id (frontend-0)"
        )

    virtually(play)


def test_the_unmodified_message_is_readable() -> None:
    """The messages above are wrong in one thing only."""

    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        scene.calls.streams[-1].messages.put_nowait(
            StreamStepsResponse(legs=[leg.number], indices=[0], token_ids=[8], logprobs=[logprobs(leg.number, 8)])
        )
        await scene.settle()
        assert (heard.token_ids, [entry.token_id for entry in heard.logprobs], heard.ends) == ([8], [8], [])

    virtually(play)
