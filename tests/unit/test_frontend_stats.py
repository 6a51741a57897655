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
    """A frontend's request traces on clocks that a test moves."""

    def __init__(self) -> None:
        self.clock = ManualClock(WALL_S)
        self.traces: TraceStore[RequestTrace] = TraceStore()
        self.stats = RequestStats(self.traces, self.clock)

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
    stats = world.stats
    with world.traces.following(RequestTrace(clock=world.clock, request_id="r")) as trace:
        for _ in range(3):
            stats.look()
        assert (stats.open_count, stats.ttft.latencies()) == (1, None)
        broken_then_continued(world, trace)
        for _ in range(3):
            stats.look()
        assert stats.tokens.total == 5
        assert stats.itl.latencies().count == 4  # type: ignore[union-attr]
        assert stats.continuations == 1
        assert not stats.outcomes
        world.tokens(trace, 0.01)
        trace.finish("length", 6, 6, 0)
    assert stats.open_count == 0
    assert dict(stats.outcomes) == {"finished": 1}
    assert stats.tokens.total == 6
    assert stats.kv_transfer_bytes.total == 2_400
    assert dict(stats.leg_failures) == {("decode-1", "LEG_FAILED"): 1}
    ttft, itl = stats.ttft.latencies(), stats.itl.latencies()
    assert ttft is not None
    assert itl is not None
    assert (ttft.count, itl.count, stats.continuations) == (1, 5, 1)
    assert ttft.p50_s == pytest.approx(0.5, rel=0.03)
    assert itl.longest_s == pytest.approx(0.2, rel=0.001)
    assert not stats._seen, "what has ended is forgotten"


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
    assert dict(world.stats.outcomes) == {"refused": 1, "failed": 1, "cancelled": 2}


def test_the_table_of_failures_is_bounded() -> None:
    world = World()
    for number in range(2 * FAILURES_MAX):
        with world.traces.following(RequestTrace(clock=world.clock)) as trace:
            attempt = world.attempt(trace)
            attempt.broke("decode", decode(f"w-{number}"), "decoding", "LEG_FAILED")
            attempt.end(None, None)
    failures = world.stats.leg_failures
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
    timeline = timeline_of(trace)
    assert "secret" not in str(timeline), "a prompt is for traces, and only where that was asked for"
    assert (timeline.request_id, timeline.call_id, timeline.operation) == ("r", "c", "chat")
    assert timeline.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert (timeline.usage.prompt_tokens, timeline.usage.completion_tokens, timeline.usage.cached_tokens) == (6, 5, 2)
    assert timeline.begin.time.ToNanoseconds() == WALL_S * 1e9
    assert timeline.first_token.offset.ToMilliseconds() == 504
    assert timeline.first_token.time.ToMilliseconds() == WALL_S * 1e3 + 504
    first, second = timeline.attempts
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
    assert timeline.inter_token_latency.count == 4
    assert timeline.inter_token_latency.p50.ToMilliseconds() == 10
    assert timeline.inter_token_latency.longest.ToMilliseconds() == 200


def test_the_timeline_of_a_failed_request_has_its_reason() -> None:
    world = World()
    fields: dict[str, Any] = {"role": "decode"}
    with pytest.raises(NoWorkers), world.traces.following(RequestTrace(clock=world.clock, request_id="r")) as trace:
        raise NoWorkers("no decode worker is alive", **fields)
    timeline = timeline_of(trace)
    assert timeline.outcome == pb.REQUEST_OUTCOME_REFUSED
    assert timeline.error_reason == error_pb2.ERROR_REASON_NO_WORKERS
    assert timeline.error_message == "no decode worker is alive"
