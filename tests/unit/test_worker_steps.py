"""The worker's side of a step stream: messages are packed and bounded, and each leg ends once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.types.v1 import leg_pb2, sampling_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.domain.generation import EngineFinish, EngineRequest, FinishReason, TokenLogprob
from tandem.domain.worker import Worker
from tandem.engine.port import Output
from tandem.errors import EngineFailed, InvalidRequest, NotSupported, ServiceError, TandemError
from tandem.rpc.status import from_status
from tandem.service.awake_timers import AwakeTimers
from tandem.testing.virtual_time import run_virtually
from tandem.worker import steps
from tandem.worker.leg_messages import engine_request
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs, engine_id
from tandem.worker.steps import StepStream, StepStreams
from tests.unit.support.frontend_workers import aggregated

WORKER = aggregated()


class ScriptedEngine:
    """An engine whose outputs the test puts out."""

    def __init__(self) -> None:
        self.outputs: dict[str, Output] = {}
        self.refusal: TandemError | None = None

    async def submit(self, request: EngineRequest, output: Output) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.outputs[request.request_id] = output

    def abort(self, request_id: str) -> bool:
        output = self.outputs.pop(request_id, None)
        if output is not None:
            output.finish(EngineFinish(reason=FinishReason.ABORTED))
        return output is not None


class Identity:
    def current(self) -> Worker:
        return WORKER


class Scene:
    """A worker around a scripted engine, and one frontend."""

    def __init__(self) -> None:
        engine: Any = ScriptedEngine()
        self.engine = engine
        self.timers = AwakeTimers()
        identity: Any = Identity()
        self.legs = Legs(self.engine, identity, timers=self.timers)
        self.streams = StepStreams(self.legs.abort_stream)
        self.starts = LegStarts(self.legs, self.streams, lambda leg: engine_request(leg, None))
        self.overflows = 0
        self.stream = self.streams.open("frontend-0", self.note_overflow)
        self.messages: AsyncGenerator[StreamStepsResponse, None] = self.stream.messages()

    def note_overflow(self) -> None:
        self.overflows += 1

    async def begin(self) -> Scene:
        first = await anext(self.messages)
        assert first.stream_id == self.stream.stream_id > 0
        return self

    async def start(self, *numbers: int, **fields: Any) -> list[leg2_pb2.LegStartResult]:
        legs = [start_of(number, **fields) for number in numbers]
        return await self.starts.start(self.stream.stream_id, legs)

    def engine_id(self, number: int, stream: StepStream | None = None) -> str:
        return engine_id((f"r{number}", 1), (stream or self.stream).stream_id, number)

    def output(self, number: int) -> Output:
        output: Output = self.engine.outputs[self.engine_id(number)]
        return output

    async def read(self) -> StreamStepsResponse:
        return await asyncio.wait_for(anext(self.messages), 5)


def start_of(number: int, **fields: Any) -> leg2_pb2.LegStart:
    request = leg_pb2.LegRequest(
        request_id=f"r{number}",
        attempt=1,
        model="m",
        worker_epoch=WORKER.epoch,
        token_ids=[1, 2],
        stopping=sampling_pb2.Stopping(max_tokens=9),
        **fields,
    )
    return leg2_pb2.LegStart(leg=number, request=request)


async def test_the_legs_of_one_step_leave_in_one_message() -> None:
    scene = await Scene().begin()
    results = await scene.start(1, 2, 3)
    assert [result.WhichOneof("result") for result in results] == ["accepted"] * 3
    for number in (1, 2, 3):
        scene.output(number).tokens([number + 10], ())
    step = await scene.read()
    assert list(step.legs) == [1, 2, 3]
    assert list(step.token_ids) == [11, 12, 13]
    assert (list(step.indices), list(step.counts)) == ([0, 0, 0], [])


async def test_a_slow_reader_gets_several_steps_at_once() -> None:
    scene = await Scene().begin()
    await scene.start(1, 2)
    scene.output(1).tokens([5], ())
    scene.output(2).tokens([6, 7], ())
    scene.output(1).tokens([8], ())
    scene.output(1).finish(EngineFinish(reason=FinishReason.LENGTH))
    step = await scene.read()
    assert (list(step.legs), list(step.indices), list(step.counts)) == ([1, 2, 1], [0, 0, 1], [1, 2, 1])
    assert list(step.token_ids) == [5, 6, 7, 8]
    assert [end.leg for end in step.ends] == [1]


async def test_log_probabilities_travel_only_for_legs_that_asked() -> None:
    scene = await Scene().begin()
    await scene.start(1, 2)
    scene.output(1).tokens([5], ())
    scene.output(2).tokens([6], (TokenLogprob(token_id=6, logprob=-0.5, top=((6, -0.5), (7, -1.0))),))
    step = await scene.read()
    assert [entry.leg for entry in step.logprobs] == [2]
    assert step.logprobs[0].logprobs[0].top[1].token_id == 7


async def test_a_leg_that_is_refused_stops_no_other_and_is_never_named() -> None:
    scene = await Scene().begin()
    scene.engine.refusal = NotSupported("no grammar here", field="guided")
    (refused,) = await scene.start(1)
    scene.engine.refusal = None
    wrong = start_of(2)
    wrong.request.worker_epoch = 1
    stale, taken = await scene.starts.start(scene.stream.stream_id, [wrong, start_of(3)])
    assert from_status(refused.refused).reason == "NOT_SUPPORTED"
    assert from_status(stale.refused).reason == "STALE_EPOCH"
    assert taken.accepted.worker_id == WORKER.worker_id
    assert scene.legs.open_count == 1
    assert list(scene.stream._open) == [3]


@pytest.mark.parametrize("number", [1, 0])
async def test_a_leg_that_is_no_new_one_is_refused(number: int) -> None:
    scene = await Scene().begin()
    await scene.start(1)
    again = start_of(2)
    again.leg = number
    (result,) = await scene.starts.start(scene.stream.stream_id, [again])
    assert isinstance(from_status(result.refused), InvalidRequest)
    assert scene.legs.open_count == 1


@pytest.mark.parametrize("is_other_frontend", [False, True])
async def test_legs_of_one_request_id_and_attempt_are_independent(is_other_frontend: bool) -> None:
    scene = await Scene().begin()
    other = scene.streams.open("frontend-1", scene.note_overflow) if is_other_frontend else scene.stream
    again = start_of(2)
    again.request.request_id = "r1"
    await scene.start(1)
    (result,) = await scene.starts.start(other.stream_id, [again])
    assert result.WhichOneof("result") == "accepted"
    assert len(scene.engine.outputs) == 2
    assert scene.legs.abort_numbered(scene.stream.stream_id, [1]) == 1
    (name,) = scene.engine.outputs
    assert name == engine_id(("r1", 1), other.stream_id, 2)
    assert scene.legs.open_count == 1
    scene.engine.outputs[name].finish(EngineFinish(reason=FinishReason.LENGTH))
    assert scene.legs.open_count == 0


async def test_an_abort_by_request_id_aborts_all_its_legs_and_no_others() -> None:
    scene = await Scene().begin()
    again = start_of(2)
    again.request.request_id, again.request.attempt = "r1", 2
    await scene.start(1, 3)
    await scene.starts.start(scene.stream.stream_id, [again])
    assert scene.legs.abort("r1", 2) == 1
    again.leg = 4
    await scene.starts.start(scene.stream.stream_id, [again])
    assert scene.legs.abort("r1", None) == 2
    assert list(scene.engine.outputs) == [scene.engine_id(3)]


async def test_a_stream_that_is_not_open_takes_no_leg() -> None:
    scene = await Scene().begin()
    with pytest.raises(ServiceError, match="step stream 77 is not open"):
        await scene.starts.start(77, [start_of(1)])
    scene.streams.close(scene.stream)
    with pytest.raises(ServiceError):
        await scene.start(1)


async def test_an_abort_is_a_legs_one_end() -> None:
    scene = await Scene().begin()
    await scene.start(1, 2)
    assert scene.legs.abort_numbered(scene.stream.stream_id, [1, 9]) == 1
    step = await scene.read()
    assert [end.leg for end in step.ends] == [1]
    assert step.ends[0].finish.reason == 3
    assert scene.legs.open_count == 1
    assert scene.legs.abort_numbered(scene.stream.stream_id, [1]) == 0


async def test_a_frontend_that_vanishes_ends_its_own_legs_only() -> None:
    scene = await Scene().begin()
    other = scene.streams.open("frontend-1", scene.note_overflow)
    await scene.start(1, 2)
    await scene.starts.start(other.stream_id, [start_of(3)])
    scene.streams.close(scene.stream)
    assert list(scene.engine.outputs) == [scene.engine_id(3, other)]
    with pytest.raises(ServiceError):
        await scene.read()


def test_a_leg_whose_deadline_passes_ends_with_that_error() -> None:
    async def live() -> None:
        scene = await Scene().begin()
        start = start_of(1)
        start.timeout.FromMilliseconds(700)
        await scene.starts.start(scene.stream.stream_id, [start])
        end = (await _first_end(scene)).failure
        assert from_status(end).reason == "DEADLINE_EXCEEDED"
        assert 0.7 <= asyncio.get_running_loop().time() < 0.9
        assert not scene.engine.outputs

    run_virtually(live())


def test_a_silent_leg_is_named_within_the_contracts_time() -> None:
    async def live() -> None:
        scene, loop = await Scene().begin(), asyncio.get_running_loop()
        await scene.start(1, 2)
        named = {1: [loop.time()], 2: [loop.time()]}
        while loop.time() < 3:
            step = await scene.read()
            for number in [*step.legs, *step.alive]:
                named[number].append(loop.time())
            if 1.0 < loop.time() < 2.0:
                scene.output(2).tokens([7], ())
                await asyncio.sleep(0.05)
        for moments in named.values():
            gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
            assert max(gaps) <= 0.4 + 0.1, gaps
        scene.output(1).finish(EngineFinish(reason=FinishReason.LENGTH))
        scene.output(2).finish(EngineFinish(reason=FinishReason.LENGTH))
        await asyncio.sleep(1)
        assert scene.stream._timer is None, "a stream without legs costs nothing"

    run_virtually(live())


async def test_a_frontend_that_does_not_read_is_bounded_and_loses_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WAITING_TOKENS_MAX", 100)
    scene = await Scene().begin()
    other = scene.streams.open("frontend-1", scene.note_overflow)
    await scene.start(1)
    await scene.starts.start(other.stream_id, [start_of(2)])
    output = scene.output(1)
    for _ in range(200):
        output.tokens([5], ())
    assert scene.overflows == 1
    assert scene.legs.open_count == 1
    assert list(scene.engine.outputs) == [scene.engine_id(2, other)]
    assert not scene.stream._token_ids, "nothing is kept for it"
    with pytest.raises(ServiceError):
        await scene.read()


async def test_a_failure_names_leg_worker_attempt_and_room() -> None:
    scene = await Scene().begin()
    await scene.start(1)
    scene.output(1).fail(EngineFailed("out of memory"))
    problem = from_status((await scene.read()).ends[0].failure)
    assert problem.metadata == {"leg": "aggregated", "worker": WORKER.worker_id, "attempt": "1"}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=40), st.data())
async def test_whatever_is_read_when_each_leg_has_its_tokens_once(
    words: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Tokens in order with contiguous places, the end after them, nothing after the end."""
    stream = StepStream(1, "f", lambda: None)
    said: dict[int, list[int]] = {number: [] for number in range(1, 5)}
    heard: dict[int, list[int]] = {number: [] for number in range(1, 5)}
    ended: list[int] = []

    def hear() -> None:
        message = stream._take()
        token_ids = iter(message.token_ids)
        counts = message.counts or [1] * len(message.legs)
        for number, index, count in zip(message.legs, message.indices, counts, strict=True):
            assert index == len(heard[number])
            assert number not in ended
            heard[number] += [next(token_ids) for _ in range(count)]
        ended.extend(end.leg for end in message.ends)

    for number, count in words:
        if number in ended or number in (end.leg for end in stream._message.ends):
            continue
        if count:
            token_ids = [len(said[number]) + place for place in range(count)]
            stream.tokens(number, len(said[number]), token_ids, ())
            said[number] += token_ids
        else:
            stream.finish(number, leg_pb2.LegFinish())
        if data.draw(st.booleans()):
            hear()
    hear()
    assert heard == said


async def _first_end(scene: Scene) -> leg2_pb2.LegEnd:
    while True:
        step = await scene.read()
        if step.ends:
            return step.ends[0]


async def test_ends_of_a_frontend_that_does_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WAITING_TOKENS_MAX", 100)
    scene = await Scene().begin()
    most = 0
    while not scene.overflows:
        most += 1
        await scene.start(most)
        scene.output(most).fail(EngineFailed("m" * 100))
    assert 1 < most < 100 / steps.END_TOKENS
    assert not scene.stream._message.ends, "nothing is kept for it"
    with pytest.raises(ServiceError):
        await scene.read()


async def test_counts_are_left_out_only_where_each_is_one() -> None:
    stream = StepStream(1, "f", lambda: None)
    stream._take()
    stream.tokens(1, 0, [10, 11], ())
    stream.tokens(2, 0, [], ())
    assert list(stream._take().counts) == [2, 0]
    stream.tokens(1, 2, [12], ())
    stream.tokens(2, 0, [20], ())
    assert list(stream._take().counts) == []


async def test_a_defect_at_one_start_is_that_legs_refusal(caplog: pytest.LogCaptureFixture) -> None:
    scene = await Scene().begin()
    submit = scene.engine.submit

    async def broken(request: EngineRequest, output: Output) -> None:
        if request.request_id == scene.engine_id(2):
            raise RuntimeError("a defect")
        await submit(request, output)

    scene.engine.submit = broken
    results = await scene.start(1, 2, 3)
    assert [result.WhichOneof("result") for result in results] == ["accepted", "refused", "accepted"]
    problem = from_status(results[1].refused)
    assert (problem.reason, str(problem)) == ("INTERNAL", "internal error at the start of a leg: RuntimeError")
    assert list(scene.stream._open) == [1, 3]
    assert [record.getMessage() for record in caplog.records] == ["leg 2 of r2 could not be started"]


async def test_an_engine_event_after_a_legs_end_is_ignored() -> None:
    scene = await Scene().begin()
    await scene.start(1)
    output = scene.output(1)
    output.tokens([5], ())
    output.finish(EngineFinish(reason=FinishReason.STOP))
    output.tokens([6], ())
    output.finish(EngineFinish(reason=FinishReason.STOP))
    output.fail(EngineFailed("again"))
    step = await scene.read()
    assert (list(step.token_ids), [end.WhichOneof("end") for end in step.ends]) == ([5], ["finish"])


@pytest.mark.parametrize("sends_rest", [True, False])
async def test_a_closed_stream_sends_what_waits_only_where_it_is_asked_to(sends_rest: bool) -> None:
    stream = StepStream(1, "f", lambda: None)
    messages = stream.messages()
    await anext(messages)
    stream.open_leg(1)
    stream.tokens(1, 0, [5, 6], ())
    stream.close(sends_rest=sends_rest)
    if sends_rest:
        assert list((await anext(messages)).token_ids) == [5, 6]
    with pytest.raises(ServiceError):
        await anext(messages)
