"""The record of a request: how its ending is read, what is kept, and that telling of it never harms it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from tandem.clock import ManualClock
from tandem.domain.generation import EngineFinish, FinishReason
from tandem.errors import LegFailed, Overloaded
from tandem.observability.request_trace import GAPS_MAX, AttemptCourse, Course, LegCourse
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import Courses, trace_ids


def test_a_failure_before_any_attempt_is_a_refusal() -> None:
    courses: Courses[Course] = Courses()
    with pytest.raises(Overloaded), courses.following(Course(request_id="r")):
        raise Overloaded("full")
    (course,) = courses.closed
    assert (course.outcome, course.reason, course.message) == ("refused", "OVERLOADED", "full")


def test_a_failure_after_dispatch_is_a_failure() -> None:
    courses: Courses[Course] = Courses()
    with pytest.raises(LegFailed), courses.following(Course(attempts=[AttemptCourse()])) as course:
        raise LegFailed("broken")
    assert (course.outcome, course.reason) == ("failed", "LEG_FAILED")


def test_a_defect_is_a_failure_without_its_text() -> None:
    courses: Courses[Course] = Courses()
    with pytest.raises(ValueError, match="secret"), courses.following(Course(attempts=[AttemptCourse()])) as course:
        raise ValueError("secret")
    assert (course.outcome, course.reason, course.message) == ("failed", "INTERNAL", "ValueError")


async def test_a_client_that_leaves_cancels_and_one_that_has_its_finish_does_not() -> None:
    courses: Courses[Course] = Courses()

    async def stream(*, finished: bool) -> AsyncGenerator[int, None]:
        with courses.following(Course()) as course:
            if finished:
                course.finish("stop", 1, 1, 0)
            yield 1
            yield 2

    for finished in (False, True):
        async with aclosing(stream(finished=finished)) as numbers:
            async for _ in numbers:
                break
    assert [course.outcome for course in courses.closed] == ["cancelled", "finished"]
    assert not courses.open

    with pytest.raises(asyncio.CancelledError), courses.following(Course()):
        raise asyncio.CancelledError
    assert courses.closed[-1].outcome == "cancelled"


def test_a_sink_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Course] = []

    def broken(course: Course) -> None:
        raise RuntimeError("the sink is broken")

    courses: Courses[Course] = Courses([broken, told.append])
    with courses.following(Course()) as course:
        course.finish("stop", 1, 1, 0)
    assert told == [course]
    assert "could not be told of" in caplog.text


def test_the_last_ones_are_kept_beside_those_that_run() -> None:
    courses: Courses[LegCourse] = Courses(closed_kept=2)
    for number in range(4):
        with courses.following(LegCourse(request_id=f"r{number % 2}", attempt=number)):
            pass
    with courses.following(LegCourse(request_id="r1", attempt=9)):
        assert [course.attempt for course in courses.open] == [9]
    assert len(courses.closed) == 2


def test_tokens_are_noted_with_their_times() -> None:
    clock = ManualClock(10.0)
    courses: Courses[Course] = Courses()
    with courses.following(Course(clock=clock)) as course:
        for number, (now_s, count) in enumerate([(11.0, 1), (11.5, 2), (12.5, 1)]):
            if number != 1:
                course.add_attempt(AttemptCourse(number=len(course.attempts) + 1))
            course.note_tokens(now_s, count)
        clock.advance(5)
        course.finish("stop", 1, 4, 0)
    assert (course.ttft_s, course.token_count, list(course.gaps_s)) == (1.0, 4, [0.5, 1.0])
    assert [(a.first_token_s, a.last_token_s) for a in course.attempts] == [(11.0, 11.5), (12.5, 12.5)]
    assert (course.begin_s, course.end_s) == (10.0, 15.0)


def test_a_long_stream_does_not_grow_its_record_without_bound() -> None:
    course = Course()
    for number in range(GAPS_MAX * 2):
        course.note_tokens(float(number), 1)
        course.event("again")
    assert len(course.gaps_s) == GAPS_MAX
    assert course.token_count == GAPS_MAX * 2
    assert len(course.events) < 100


def test_a_leg_ends_as_its_engine_says() -> None:
    courses: Courses[LegCourse] = Courses()
    with courses.following(LegCourse()) as course:
        course.finish(EngineFinish(reason=FinishReason.LENGTH))
    assert (course.outcome, course.reason) == ("finished", "length")


def test_spans_are_made_only_where_they_are_exported() -> None:
    parent = TraceContext(7, 8)
    assert Courses[Course]().child(parent) is parent
    assert Courses[Course]().child(None) is None
    courses: Courses[Course] = Courses(ids=trace_ids(1.0))
    with courses.following(Course(parent=parent)) as course:
        assert course.trace is not None
        assert (course.trace.trace_id, course.trace.span_id != 8) == (7, True)
