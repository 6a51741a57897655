"""The frontend's end of a step stream: splitting messages by leg, timeouts, and when a worker or a leg fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tandem_frontend.execution.link_leg import Bounds, Leg
from tandem_frontend.execution.worker_link import WorkerLink
from tandem_frontend.execution.worker_links import WorkerLinks

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.domain.worker import LEG_CONTRACT, Worker, WorkerState
from tandem.errors import Draining, ServiceError, TandemError
from tandem.rpc.status import to_status
from tandem.service.awake_timers import AwakeTimers
from tandem.testing.virtual_time import run_virtually
from tests.unit.support.frontend_workers import decode

WORKER = replace(decode(), leg_contract=LEG_CONTRACT)
ACCEPTED = leg2_pb2.LegStartResult(accepted=leg_pb2.LegAccepted(worker_id=WORKER.worker_id, epoch=WORKER.epoch))
BOUNDS = Bounds(accept_s=2.0, silence_s=2.0)


class Steps:
    """A step stream whose messages the test writes."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[StreamStepsResponse | TandemError] = asyncio.Queue()
        self.is_cancelled = False

    async def read(self) -> StreamStepsResponse:
        message = await self.messages.get()
        if isinstance(message, TandemError):
            raise message
        return message

    def cancel(self) -> None:
        self.is_cancelled = True


class Calls:
    """Calls to a worker that accepts every leg by default."""

    def __init__(self) -> None:
        self.streams: list[Steps] = []
        self.opening_problem: TandemError | None = None
        self.opens = True
        self.batches: list[list[int]] = []
        self.aborted: list[int] = []
        self.answer: Callable[[leg2_pb2.LegStart], leg2_pb2.LegStartResult] = lambda start: ACCEPTED
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.current: object = object()

    def connection(self, worker: Worker) -> object:
        return self.current

    def open_steps(self, worker: Worker, frontend_id: str) -> Steps:
        steps = Steps()
        self.streams.append(steps)
        if self.opening_problem is not None:
            steps.messages.put_nowait(self.opening_problem)
        elif self.opens:
            steps.messages.put_nowait(StreamStepsResponse(stream_id=len(self.streams)))
        return steps

    async def start_legs(
        self, worker: Worker, stream_id: int, legs: Sequence[leg2_pb2.LegStart]
    ) -> Sequence[leg2_pb2.LegStartResult]:
        self.batches.append([start.leg for start in legs])
        await self.may_answer.wait()
        return [self.answer(start) for start in legs]

    async def abort_legs(self, worker: Worker, stream_id: int, legs: Iterable[int]) -> None:
        self.aborted += legs


class Heard:
    """A sink that records its events."""

    def __init__(self) -> None:
        self.accepted_count = 0
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.ends: list[Any] = []
        self.unresponsive_count = 0

    def accepted(self) -> None:
        self.accepted_count += 1

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[Any]) -> None:
        assert index == len(self.token_ids)
        self.token_ids += token_ids
        self.logprobs += logprobs

    def finish(self, finish: leg_pb2.LegFinish) -> None:
        self.ends.append(finish)

    def fail(self, problem: TandemError) -> None:
        self.ends.append(problem)

    def unresponsive(self) -> None:
        self.unresponsive_count += 1

    @property
    def failure(self) -> str:
        (end,) = self.ends
        return str(end)


class Scene:
    """A link to a fake worker."""

    def __init__(self) -> None:
        self.calls: Any = Calls()
        self.timers = AwakeTimers()
        self.serves = True
        self.asked = 0
        calls: Any = self.calls
        self.link = WorkerLink(
            WORKER, "frontend-0", calls, BOUNDS, self.timers, self.check_health, asyncio.Semaphore(1)
        )

    async def check_health(self, worker: Worker) -> bool:
        self.asked += 1
        await asyncio.sleep(0.5)
        return self.serves

    def start(self) -> tuple[Leg, Heard]:
        heard = Heard()
        return self.link.start(leg_pb2.LegRequest(request_id="r"), heard, None, ()), heard

    async def started(self) -> tuple[Leg, Heard]:
        leg, heard = self.start()
        await self.settle()
        assert heard.accepted_count == 1
        return leg, heard

    def say(self, **fields: Any) -> None:
        self.calls.streams[-1].messages.put_nowait(StreamStepsResponse(**fields))

    def tokens(self, *words: tuple[Leg, int, int]) -> None:
        legs, indices, token_ids = zip(*((leg.number, index, token) for leg, index, token in words), strict=True)
        self.say(legs=legs, indices=indices, token_ids=token_ids)

    async def settle(self) -> None:
        await asyncio.sleep(0.001)

    async def keep_alive(self, *legs: Leg, until_s: float) -> None:
        while asyncio.get_running_loop().time() < until_s:
            self.say(alive=[leg.number for leg in legs])
            await asyncio.sleep(0.3)


def virtually(play: Callable[[Scene], Any]) -> None:
    async def live() -> None:
        scene = Scene()
        await play(scene)
        await scene.link.close()
        scene.timers.close()

    run_virtually(live())


def test_the_starts_of_one_turn_go_in_one_call() -> None:
    async def play(scene: Scene) -> None:
        await scene.settle()
        legs = [scene.start() for _ in range(5)]
        await scene.settle()
        assert scene.calls.batches == [[1, 2, 3, 4, 5]]
        assert all(heard.accepted_count == 1 for _, heard in legs)

    virtually(play)


def test_a_leg_that_is_started_before_the_stream_is_open_waits_for_it() -> None:
    async def play(scene: Scene) -> None:
        _, heard = scene.start()
        await scene.settle()
        assert heard.accepted_count == 1

    virtually(play)


def test_a_step_is_split_by_leg() -> None:
    async def play(scene: Scene) -> None:
        (one, heard_one), (two, heard_two) = await scene.started(), await scene.started()
        scene.tokens((one, 0, 5), (two, 0, 6))
        scene.say(
            legs=[one.number, two.number, one.number], indices=[1, 1, 3], counts=[2, 1, 1], token_ids=[7, 8, 9, 4]
        )
        scene.say(ends=[leg2_pb2.LegEnd(leg=one.number, finish=leg_pb2.LegFinish())])
        await scene.settle()
        assert (heard_one.token_ids, heard_two.token_ids) == ([5, 7, 8, 4], [6, 9])
        assert (len(heard_one.ends), heard_two.ends) == (1, [])
        assert scene.link.leg_count == 1

    virtually(play)


def test_log_probabilities_of_several_steps_in_one_message_go_to_their_tokens() -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        entries = [
            leg2_pb2.LegLogprobs(leg=leg.number, logprobs=[generation_pb2.TokenLogprob(token_id=t) for t in part])
            for part in ([5], [6, 7])
        ]
        scene.say(legs=[leg.number] * 2, indices=[0, 1], counts=[1, 2], token_ids=[5, 6, 7], logprobs=entries)
        await scene.settle()
        assert [entry.token_id for entry in heard.logprobs] == [5, 6, 7]

    virtually(play)


def test_a_refused_leg_gets_the_reason_and_others_run() -> None:
    async def play(scene: Scene) -> None:
        refused = leg2_pb2.LegStartResult(refused=to_status(Draining("going away")))
        scene.calls.answer = lambda start: refused if start.leg == 1 else ACCEPTED
        (_, first), (_, second) = scene.start(), scene.start()
        await scene.settle()
        assert isinstance(first.ends[0], Draining)
        assert (second.accepted_count, second.ends) == (1, [])

    virtually(play)


def test_a_broken_stream_fails_every_leg_and_is_reopened() -> None:
    async def play(scene: Scene) -> None:
        (_, one), (_, two) = await scene.started(), await scene.started()
        scene.calls.streams[-1].messages.put_nowait(ServiceError("connection reset", phase="x"))
        await scene.settle()
        assert one.failure == two.failure == "connection reset"
        assert one.ends[0] is not two.ends[0], "each takes in facts of its own leg"
        await asyncio.sleep(0.2)
        _, three = await scene.started()
        assert not three.ends

    virtually(play)


def test_a_worker_that_cannot_be_reached_fails_a_leg_at_once() -> None:
    async def play(scene: Scene) -> None:
        scene.calls.opening_problem = ServiceError("connection refused")
        await scene.settle()
        _, heard = scene.start()
        await scene.settle()
        assert heard.failure == "connection refused"
        assert not scene.calls.batches
        scene.calls.opening_problem = None
        await asyncio.sleep(1.5)
        await scene.started()

    virtually(play)


def test_opening_a_stream_has_a_timeout() -> None:
    async def play(scene: Scene) -> None:
        scene.calls.opens = False
        _, heard = scene.start()
        await asyncio.sleep(2.3)
        assert heard.ends
        assert asyncio.get_running_loop().time() < 2.5

    virtually(play)


def test_a_leg_accepted_too_late_has_failed_and_is_aborted() -> None:
    async def play(scene: Scene) -> None:
        scene.calls.may_answer.clear()
        await scene.settle()
        leg, heard = scene.start()
        await scene.keep_alive(until_s=2.3)
        assert heard.failure == "leg not accepted within 2 s"
        assert scene.asked == 1, "the worker was asked before"
        assert not scene.calls.aborted, "it may not have it yet"
        scene.calls.may_answer.set()
        await scene.settle()
        assert scene.calls.aborted == [leg.number]

    virtually(play)


def test_a_silent_worker_is_checked_and_then_its_legs_fail() -> None:
    async def play(scene: Scene) -> None:
        _, heard = await scene.started()
        await asyncio.sleep(1.2)
        assert (scene.asked, heard.unresponsive_count, heard.ends) == (1, 0, [])
        await asyncio.sleep(1.3)
        assert heard.failure == "no message from the worker for 2 s"
        assert heard.unresponsive_count == 0, "it said that it serves"

    virtually(play)


def test_the_legs_of_an_unresponsive_worker_are_notified_soon() -> None:
    async def play(scene: Scene) -> None:
        scene.serves = False
        _, heard = await scene.started()
        await asyncio.sleep(1.6)
        assert heard.unresponsive_count == 1

    virtually(play)


def test_a_worker_that_sends_a_message_while_it_is_checked_is_not_given_up() -> None:
    async def play(scene: Scene) -> None:
        scene.serves = False
        leg, heard = await scene.started()
        await asyncio.sleep(1.1)
        await scene.keep_alive(leg, until_s=6.0)
        assert (heard.unresponsive_count, heard.ends) == (0, [])

    virtually(play)


def test_the_loops_own_lag_is_not_the_workers_silence() -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        for _ in range(5):
            await asyncio.sleep(0.2)
            # The loop stands still for longer than any bound; what the worker says meanwhile is read afterwards.
            asyncio.get_running_loop()._now_s += 10.0  # type: ignore[attr-defined]
            scene.say(alive=[leg.number])
            await asyncio.sleep(0.2)
        assert (scene.asked, heard.ends) == (0, [])

    virtually(play)


def test_a_leg_that_is_no_longer_listed_fails() -> None:
    async def play(scene: Scene) -> None:
        (one, kept), (other, lost) = await scene.started(), await scene.started()
        scene.tokens((other, 0, 5))
        await scene.keep_alive(one, until_s=3.0)
        assert kept.ends == []
        assert lost.failure == "the worker no longer lists this leg: it lost it, or ended it without saying so"

    virtually(play)


def test_a_leg_that_is_never_listed_fails_later() -> None:
    async def play(scene: Scene) -> None:
        (one, kept), (_, lost) = await scene.started(), await scene.started()
        await scene.keep_alive(one, until_s=9.0)
        assert lost.ends == []
        await scene.keep_alive(one, until_s=12.0)
        assert kept.ends == []
        assert lost.failure == "the worker no longer lists this leg: it lost it, or ended it without saying so"

    virtually(play)


def test_a_leg_whose_listing_comes_late_is_not_lost() -> None:
    """The worker, or this process, has too little processor time; messages with the tokens of others do arrive."""

    async def play(scene: Scene) -> None:
        (silent, waiting), (chatty, _) = await scene.started(), await scene.started()
        for number in range(60):
            if number % 30 == 0:
                scene.say(alive=[silent.number])
            scene.tokens((chatty, number, 5))
            await asyncio.sleep(0.1)
        assert waiting.ends == []

    virtually(play)


def test_an_abort_is_repeated_while_the_worker_still_lists_the_leg() -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        leg.abort()
        leg.abort()
        await scene.settle()
        assert scene.calls.aborted == [leg.number]
        scene.tokens((leg, 0, 5))
        await asyncio.sleep(1.1)
        assert scene.calls.aborted == [leg.number] * 2, "it was lost"
        scene.say(ends=[leg2_pb2.LegEnd(leg=leg.number, finish=leg_pb2.LegFinish())])
        await scene.settle()
        assert (heard.token_ids, heard.ends, scene.link.leg_count) == ([], [], 0)

    virtually(play)


def test_a_leg_aborted_in_the_turn_of_its_start_is_not_sent() -> None:
    async def play(scene: Scene) -> None:
        await scene.settle()
        leg, _ = scene.start()
        leg.abort()
        await scene.settle()
        assert (scene.calls.batches, scene.link.leg_count) == ([], 0)

    virtually(play)


def test_an_unknown_leg_is_aborted_and_affects_no_other() -> None:
    async def play(scene: Scene) -> None:
        leg, heard = await scene.started()
        scene.say(legs=[99, leg.number], indices=[0, 0], token_ids=[4, 5], alive=[98])
        await scene.settle()
        assert sorted(scene.calls.aborted) == [98, 99]
        assert heard.token_ids == [5]

    virtually(play)


@pytest.mark.parametrize(
    "wrong",
    [
        {"legs": [1], "indices": [], "token_ids": [5]},
        {"legs": [1], "indices": [0], "token_ids": [5, 6]},
        {"legs": [1], "indices": [0], "counts": [2], "token_ids": [5]},
        {"legs": [1, 1], "indices": [0, 1], "counts": [1], "token_ids": [5, 6]},
    ],
)
def test_lists_that_differ_in_length_end_the_stream_and_not_the_process(wrong: dict[str, Any]) -> None:
    async def play(scene: Scene) -> None:
        _, heard = await scene.started()
        scene.say(**wrong)
        await scene.settle()
        assert "lists differ in length" in heard.failure
        assert heard.token_ids == []
        await asyncio.sleep(0.2)
        await scene.started()

    virtually(play)


def test_a_sink_that_raises_fails_its_own_leg_only() -> None:
    async def play(scene: Scene) -> None:
        (one, broken), (two, whole) = await scene.started(), await scene.started()
        broken.tokens = lambda *words: 1 / 0  # type: ignore[assignment, method-assign]
        scene.tokens((one, 0, 5), (two, 0, 6))
        await scene.settle()
        assert broken.failure == "internal error in a leg: ZeroDivisionError"
        assert (whole.token_ids, whole.ends) == ([6], [])
        assert scene.calls.aborted == [one.number]

    virtually(play)


def test_nothing_ticks_for_a_link_without_legs() -> None:
    async def play(scene: Scene) -> None:
        leg, _ = await scene.started()
        scene.say(ends=[leg2_pb2.LegEnd(leg=leg.number, finish=leg_pb2.LegFinish())])
        await asyncio.sleep(3)
        assert scene.timers._ticker is None

    virtually(play)


class Links:
    """The links of a frontend to fake workers."""

    def __init__(self) -> None:
        calls: Any = Calls()
        self.calls = calls
        self.timers = AwakeTimers()
        self.links = WorkerLinks("frontend-0", calls, BOUNDS, self.timers, self.check_health)

    async def check_health(self, worker: Worker) -> bool:
        return True


def test_a_worker_that_leaves_the_view_keeps_its_link_until_its_legs_have_ended() -> None:
    async def live() -> None:
        scene = Links()
        scene.links.follow([WORKER])
        heard = Heard()
        leg = scene.links.get(WORKER).start(leg_pb2.LegRequest(), heard, None, ())
        await asyncio.sleep(0.01)
        scene.links.follow([])
        await asyncio.sleep(1.2)
        steps = scene.calls.streams[0]
        assert not steps.is_cancelled
        assert not heard.ends
        steps.messages.put_nowait(
            StreamStepsResponse(ends=[leg2_pb2.LegEnd(leg=leg.number, finish=leg_pb2.LegFinish())])
        )
        await asyncio.sleep(1.2)
        assert steps.is_cancelled
        await scene.links.close()

    run_virtually(live())


def test_a_renewed_certificate_opens_a_new_link_and_keeps_running_legs() -> None:
    async def live() -> None:
        scene = Links()
        scene.links.follow([WORKER])
        former = scene.links.get(WORKER)
        heard = Heard()
        former.start(leg_pb2.LegRequest(), heard, None, ())
        await asyncio.sleep(0.01)
        scene.calls.current = object()
        assert scene.links.get(WORKER) is not former
        await asyncio.sleep(0.1)
        assert not heard.ends
        await scene.links.close()

    run_virtually(live())


def test_an_outage_is_one_line_and_has_one_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def play(scene: Scene) -> None:
        await scene.started()
        scene.calls.opening_problem = ServiceError("connection refused")
        scene.calls.streams[-1].messages.put_nowait(ServiceError("the worker is gone"))
        await asyncio.sleep(10)
        scene.calls.opening_problem = None
        await asyncio.sleep(10)

    virtually(play)
    broke, again = [record for record in caplog.records if "step stream" in record.message]
    assert broke.levelname == "WARNING"
    assert broke.message.endswith("broke, retrying; its legs continue elsewhere if they can: the worker is gone")
    assert (again.levelname, again.message) == ("INFO", f"step stream to worker {WORKER.worker_id} is open again")


def test_a_replaced_worker_whose_stream_broke_is_given_up_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def play(scene: Scene) -> None:
        await scene.started()
        scene.link.worker = replace(WORKER, state=WorkerState.DRAINING)
        scene.calls.opening_problem = ServiceError("connection refused")
        scene.calls.streams[-1].messages.put_nowait(ServiceError("the worker is gone"))
        await asyncio.sleep(10)

    virtually(play)
    broke, end = [record for record in caplog.records if "step stream" in record.message]
    assert broke.levelname == end.levelname == "INFO", "a drain that was asked for is no warning"
    start = f"step stream to worker {WORKER.worker_id} (epoch {WORKER.epoch})"
    assert end.message == f"{start} is given up: that start of it is no longer used here"


def test_a_worker_of_another_contract_gets_no_link() -> None:
    async def live() -> None:
        scene = Links()
        scene.links.follow([replace(WORKER, leg_contract=1)])
        await asyncio.sleep(0.01)
        assert not scene.calls.streams
        await scene.links.close()

    run_virtually(live())
