"""RequestStats and timelines from traces: nothing is counted twice, and open requests are included."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tandem_frontend.admin.stats import FAILURES_MAX, RequestStats
from tandem_frontend.admin.timeline import timeline_of

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.types.v1 import error_pb2, generation_pb2, leg_pb2, worker_pb2
from tandem.clock import ManualClock
from tandem.errors import LegFailed, NoWorkers
from tandem.observability.request_trace import AttemptTrace, RequestTrace
from tandem.observability.trace_store import TraceStore
from tests.unit.support.frontend_workers import decode, prefill

WALL_S = 1_795_577_668.0


class World:
    """A frontend's courses on clocks that go when told to."""

    def __init__(self) -> None:
        self.clock = ManualClock(WALL_S)
        self.traces: TraceStore[RequestTrace] = TraceStore()
        self.figures = RequestStats(self.traces, self.clock)

    def attempt(self, trace: RequestTrace, *, tokens_before: int = 0) -> AttemptTrace:
        number = len(trace.attempts) + 1
        return trace.add_attempt(
            AttemptTrace(
                number=number,
                clock=self.clock,
                room=70 + number,
                prefill_worker=prefill(),
                decode_worker=decode(f"decode-{number}"),
                candidates_count=2,
                begin_s=self.clock(),
                tokens_before=tokens_before,
            )
        )

    def tokens(self, trace: RequestTrace, *gaps_s: float) -> None:
        for gap_s in gaps_s:
            self.clock.advance(gap_s)
            trace.note_tokens(self.clock(), 1)


def leg_finish(kv_transfer_bytes: int) -> leg_pb2.LegFinish:
    return leg_pb2.LegFinish(timings=leg_pb2.LegTimings(kv_transfer_bytes=kv_transfer_bytes))


def broken_then_continued(world: World, trace: RequestTrace) -> None:
    first = world.attempt(trace)
    first.accepted("prefill")
    first.accepted("decode")
    world.tokens(trace, 0.5, 0.01, 0.01)
    first.broke("decode", decode("decode-1"), "decoding", "LEG_FAILED")
    first.end(leg_finish(1_000), None)
    second = world.attempt(trace, tokens_before=3)
    world.tokens(trace, 0.2, 0.01)
    second.end(leg_finish(1_400), leg_finish(1_400))


def test_a_request_is_counted_once_however_often_it_is_polled() -> None:
    world = World()
    figures = world.figures
    with world.traces.following(RequestTrace(clock=world.clock, request_id="r")) as trace:
        for _ in range(3):
            figures.look()
        assert (figures.open_count, figures.ttft.latencies()) == (1, None)
        broken_then_continued(world, trace)
        for _ in range(3):
            figures.look()
        assert figures.tokens.total == 5
        assert figures.itl.latencies().count == 4  # type: ignore[union-attr]
        assert figures.continuations == 1
        assert not figures.outcomes
        world.tokens(trace, 0.01)
        trace.finish("length", 6, 6, 0)
    assert figures.open_count == 0
    assert dict(figures.outcomes) == {"finished": 1}
    assert figures.tokens.total == 6
    assert figures.kv_transfer_bytes.total == 2_400
    assert dict(figures.leg_failures) == {("decode-1", "LEG_FAILED"): 1}
    ttft, itl = figures.ttft.latencies(), figures.itl.latencies()
    assert ttft is not None
    assert itl is not None
    assert (ttft.count, itl.count, figures.continuations) == (1, 5, 1)
    assert ttft.p50_s == pytest.approx(0.5, rel=0.03)
    assert itl.longest_s == pytest.approx(0.2, rel=0.001)
    assert not figures._seen, "what has ended is forgotten"


def test_outcomes_are_counted_separately() -> None:
    world = World()

    def end_with(raised: BaseException, *, attempted: bool) -> None:
        trace = RequestTrace()
        if attempted:
            world.attempt(trace)
        with pytest.raises(type(raised)), world.traces.following(trace):
            raise raised

    end_with(NoWorkers("none"), attempted=False)
    end_with(LegFailed("broke"), attempted=True)
    end_with(asyncio.CancelledError(), attempted=True)
    end_with(GeneratorExit(), attempted=True)
    assert dict(world.figures.outcomes) == {"refused": 1, "failed": 1, "cancelled": 2}


def test_the_table_of_failures_is_bounded() -> None:
    world = World()
    for number in range(2 * FAILURES_MAX):
        with world.traces.following(RequestTrace(clock=world.clock)) as trace:
            attempt = world.attempt(trace)
            attempt.broke("decode", decode(f"w-{number}"), "decoding", "LEG_FAILED")
            attempt.end(None, None)
    failures = world.figures.leg_failures
    assert len(failures) <= FAILURES_MAX + 1
    assert failures["", "LEG_FAILED"] == FAILURES_MAX
    assert failures.total() == 2 * FAILURES_MAX


def test_a_timeline_has_both_attempts() -> None:
    world = World()
    with world.traces.following(
        RequestTrace(clock=world.clock, request_id="r", call_id="c", operation="chat", model="m", prompt="a secret")
    ) as trace:
        world.clock.advance(0.004)
        trace.step("tokenise", trace.begin_s)
        broken_then_continued(world, trace)
        still_open = timeline_of(trace)
        trace.finish("length", 6, 5, 2)
    assert still_open.outcome == pb.REQUEST_OUTCOME_OPEN
    assert not still_open.HasField("end")
    assert not still_open.HasField("usage")
    told = timeline_of(trace)
    assert "secret" not in str(told), "a prompt is for traces, and only where that was asked for"
    assert (told.request_id, told.call_id, told.operation) == ("r", "c", "chat")
    assert told.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.cached_tokens) == (6, 5, 2)
    assert told.begin.time.ToNanoseconds() == WALL_S * 1e9
    assert told.first_token.offset.ToMilliseconds() == 504
    assert told.first_token.time.ToMilliseconds() == WALL_S * 1e3 + 504
    first, second = told.attempts
    assert (first.bootstrap_room, second.bootstrap_room) == (71, 72)
    assert (first.prefill.worker_id, first.decode.worker_id) == ("prefill-0", "decode-1")
    assert first.decode.epoch == decode("decode-1").epoch
    assert first.decode.accepted.offset.ToMilliseconds() == 4
    assert first.failure.leg == worker_pb2.WORKER_ROLE_DECODE
    assert (first.failure.worker_id, first.failure.phase) == ("decode-1", "decoding")
    assert first.failure.reason == error_pb2.ERROR_REASON_LEG_FAILED
    assert not second.HasField("failure")
    assert second.tokens_before == 3
    assert second.prefill.timings.kv_transfer_bytes == 1_400
    assert told.inter_token_latency.count == 4
    assert told.inter_token_latency.p50.ToMilliseconds() == 10
    assert told.inter_token_latency.longest.ToMilliseconds() == 200


def test_the_timeline_of_a_failed_request_has_its_reason() -> None:
    world = World()
    fields: dict[str, Any] = {"role": "decode"}
    with pytest.raises(NoWorkers), world.traces.following(RequestTrace(clock=world.clock, request_id="r")) as trace:
        raise NoWorkers("no decode worker is alive", **fields)
    told = timeline_of(trace)
    assert told.outcome == pb.REQUEST_OUTCOME_REFUSED
    assert told.error_reason == error_pb2.ERROR_REASON_NO_WORKERS
    assert told.error_message == "no decode worker is alive"
