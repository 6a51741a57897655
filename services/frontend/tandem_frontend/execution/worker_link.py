"""The link to one start of one worker: its step stream, the legs that run on it, and their starts and aborts.

One loop reads the stream, takes each message apart and calls every leg's sink; nothing waits for a token. Owns the
legs' numbers, the batches in which starts and aborts are sent, and the proof that worker and legs live: a worker is
silent as a whole, and a leg that it does not name any more is lost. What a failure means for an attempt is the sink's
business; a defect of one sink never reaches another.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from itertools import islice
from typing import Any

from google.protobuf import duration_pb2

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.client.step_calls import StepCall, WorkerCalls
from tandem.domain.worker import Worker
from tandem.errors import LegFailed, ServiceError, TandemError
from tandem.observability.trace_context import TRACEPARENT, TRACESTATE, Headers
from tandem.rpc.backoff import Backoff
from tandem.rpc.status import from_status
from tandem.service.awake_timers import AwakeTimers, Timer
from tandem_frontend.execution.link_leg import Bounds, Leg, Sink, batch, copied, tell_failed
from tandem_frontend.execution.step_logprobs import by_leg

log = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often a link with legs looks whether anything was heard."""
NAMED_S = 1.0
"""Each open leg is named several times within it; one that is missing twice in a row is lost."""
OPENING_S = 2.0
"""Within which a worker must open its stream."""
STEADY_S = 1.0
"""A stream that has been open for so long is opened again at once when it breaks; others wait longer each time."""
UNKNOWN_LEGS_MAX = 16_384
"""Most legs in one message that are not open here; a worker that names more does not speak of this frontend's."""
UNKNOWN_LEGS_TOLD = 5


class WorkerLink:
    """The link to one start of a worker, opened at once and kept open until `close`."""

    def __init__(
        self,
        worker: Worker,
        frontend_id: str,
        calls: WorkerCalls,
        bounds: Bounds,
        timers: AwakeTimers,
        answers: Callable[[Worker], Awaitable[bool]],
        opening: asyncio.Semaphore,
    ) -> None:
        """`answers` asks a worker whether it serves; `opening` bounds how many links open at a time.

        Raises:
            ServiceError: the worker cannot be connected to.
        """
        self.worker = worker
        self._frontend_id = frontend_id
        self._calls = calls
        self.connection = calls.connection(worker)
        """What its calls go over."""
        self._bounds = bounds
        self._timers = timers
        self._answers = answers
        self._opening = opening
        self._legs: dict[int, Leg] = {}
        self._next_number = 1
        self._stream_id = 0
        """0: the stream is not open."""
        self._opened_s = 0.0
        self._problem: TandemError | None = None
        """Why it could not be opened a moment ago."""
        self._unsent: list[Leg] = []
        self._fresh: list[Leg] = []
        """Legs of this turn of the loop."""
        self._to_abort: dict[int, None] = {}
        self._is_flushing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_spoken = False
        self._has_named = False
        """Whether it has spoken since the last look at who is lost."""
        self._silent_s = 0.0
        self._is_asked = False
        self._looking: Timer | None = None
        self._naming: Timer | None = None
        self._is_closed = False
        # In a context of its own: it outlives the request that may be the first one here.
        self._reading = asyncio.create_task(
            self._keep_open(), name=f"steps-{worker.worker_id}", context=contextvars.Context()
        )

    @property
    def leg_count(self) -> int:
        """Legs that have not ended."""
        return len(self._legs)

    def start(self, request: leg_pb2.LegRequest, sink: Sink, timeout_s: float | None, headers: Headers) -> Leg:
        """Start a leg; all that becomes of it goes to `sink`, never before this returns.

        Args:
            request: the leg.
            sink: what hears of it.
            timeout_s: what is left of the client's deadline; None: no deadline.
            headers: which span the leg belongs to.
        """
        number, self._next_number = self._next_number, self._next_number + 1
        start = leg2_pb2.LegStart(leg=number, request=request)
        if timeout_s is not None:
            start.timeout.CopyFrom(_duration(timeout_s))
        for name, value in headers:
            if name == TRACEPARENT:
                start.traceparent = value
            elif name == TRACESTATE:
                start.tracestate = value
        leg = self._legs[number] = Leg(number, sink, start, self.abort)
        self._unsent.append(leg)
        self._fresh.append(leg)
        self._flush_soon()
        if self._looking is None:
            self._silent_s, self._is_asked = 0.0, False
            self._looking = self._timers.after(LOOK_S, self._look)
            self._naming = self._timers.after(NAMED_S, self._look_for_the_lost)
        return leg

    def abort(self, leg: Leg) -> None:
        """See `Leg.abort`."""
        if not leg.is_sent:
            self._legs.pop(leg.number, None)
        elif leg.is_started:
            self._to_abort[leg.number] = None
            self._flush_soon()
        # Otherwise its start is on the way: it is aborted when the worker has answered, which may not have it yet.

    async def close(self) -> None:
        """Close the stream, which aborts what still runs on it. May be called twice."""
        self._is_closed = True
        for timer in (self._looking, self._naming):
            if timer is not None:
                timer.cancel()
        tasks = {self._reading, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._fail_all(ServiceError(f"the link to worker {self.worker.worker_id} was closed"))

    # --- The stream

    async def _keep_open(self) -> None:
        """Read the stream, and open it again whenever it breaks, however it breaks."""
        backoff, loop = Backoff(), asyncio.get_running_loop()
        while True:
            try:
                await self._read_stream()
            except Exception as problem:
                if self._stream_id and loop.time() - self._opened_s >= STEADY_S:
                    backoff.reset()
                self._break(self._as_told(problem))
            await asyncio.sleep(backoff.next_s())

    def _as_told(self, problem: Exception) -> TandemError:
        """What a failed call means for legs. gRPC has errors of its own, for what it cannot make sense of."""
        if isinstance(problem, TandemError):
            return problem
        log.error("what worker %s said cannot be read", self.worker.worker_id, exc_info=problem)
        what = f"{type(problem).__name__}: {problem}"
        return ServiceError(f"what worker {self.worker.worker_id} said cannot be read ({what})")

    async def _read_stream(self) -> None:
        """One life of the stream; it always ends with an error."""
        call: StepCall | None = None
        try:
            async with self._opening:
                call = self._calls.open_steps(self.worker, self._frontend_id)
                first = await self._first_message(call)
            if first.stream_id < 1:
                raise ServiceError(f"worker {self.worker.worker_id} opened a step stream without a number")
            self._stream_id, self._problem = first.stream_id, None
            self._opened_s = asyncio.get_running_loop().time()
            self._flush()
            while True:
                self.take(await call.read())
        finally:
            if call is not None:
                call.cancel()

    async def _first_message(self, call: StepCall) -> StreamStepsResponse:
        """A worker that is frozen takes connections and answers nothing; other links wait for this turn to end."""
        is_late = False

        def give_up() -> None:
            nonlocal is_late
            is_late = True
            call.cancel()

        timer = self._timers.after(OPENING_S, give_up)
        try:
            return await call.read()
        except asyncio.CancelledError:
            if is_late and not self._is_closed:
                raise ServiceError(f"worker {self.worker.worker_id} did not open its step stream") from None
            raise
        finally:
            timer.cancel()

    def take(self, message: StreamStepsResponse) -> None:
        """Take a message apart: every leg that it names hears its part.

        Raises:
            ServiceError: its lists do not fit together, so that nothing in it can be told apart; or it names too many
                legs that are not open here.
        """
        self._has_spoken = self._has_named = True
        unknown: dict[int, None] = {}
        if message.legs or message.token_ids or message.indices or message.counts or message.logprobs:
            self._take_tokens(message, unknown)
        for number in message.alive:
            leg = self._legs.get(number)
            if leg is not None:
                leg.is_named = True
            else:
                self._note_unknown(number, unknown)
        for end in message.ends:
            self._end(end)
        if unknown:
            self._abort_unknown(unknown)

    def _take_tokens(self, message: StreamStepsResponse, unknown: dict[int, None]) -> None:
        numbers, indices, token_ids = list(message.legs), list(message.indices), list(message.token_ids)
        counts = list(message.counts) or [1] * len(numbers)
        if not len(numbers) == len(indices) == len(counts) or sum(counts) != len(token_ids):
            raise ServiceError(f"worker {self.worker.worker_id} sent a step whose lists do not fit together")
        logprobs: dict[int, Iterator[generation_pb2.TokenLogprob]] = {}
        if message.logprobs:
            logprobs, misfits = by_leg(message, numbers, counts)
            self._fail_misfits(misfits, unknown)
        legs, begin = self._legs, 0
        for number, index, count in zip(numbers, indices, counts, strict=True):
            end = begin + count
            leg = legs.get(number)
            if leg is None:
                self._note_unknown(number, unknown)
            else:
                leg.is_named = True
                if leg.sink is not None:
                    own = list(islice(logprobs[number], count)) if number in logprobs else ()
                    try:
                        leg.sink.tokens(index, token_ids[begin:end], own)
                    except Exception as problem:
                        self._drop_defective(leg, problem)
            begin = end

    def _end(self, end: leg2_pb2.LegEnd) -> None:
        leg = self._legs.pop(end.leg, None)
        if leg is None:
            log.debug("worker %s ended leg %d, which is not open here", self.worker.worker_id, end.leg)
            return
        sink, leg.sink = leg.sink, None
        if sink is None:
            return
        if end.WhichOneof("end") != "finish":
            tell_failed(sink, from_status(end.failure))
            return
        try:
            sink.finish(end.finish)
        except Exception as problem:
            log.exception("a leg of worker %s could not be ended here", self.worker.worker_id)
            tell_failed(sink, _defect(problem))

    def _fail_misfits(self, misfits: dict[int, str], unknown: dict[int, None]) -> None:
        """End legs whose log probabilities do not fit their tokens."""
        for number, problem in misfits.items():
            leg = self._legs.get(number)
            if leg is None:
                self._note_unknown(number, unknown)
            else:
                self._fail(leg, LegFailed(problem))

    def _drop_defective(self, leg: Leg, problem: Exception) -> None:
        """A sink has failed: its own leg ends, and no other."""
        log.error("defect in a leg of worker %s", self.worker.worker_id, exc_info=problem)
        self._fail(leg, _defect(problem))

    def _note_unknown(self, number: int, unknown: dict[int, None]) -> None:
        unknown[number] = None
        if len(unknown) > UNKNOWN_LEGS_MAX:
            raise ServiceError(
                f"worker {self.worker.worker_id} named more than {UNKNOWN_LEGS_MAX} legs that are not open here"
            )

    def _abort_unknown(self, unknown: dict[int, None]) -> None:
        """The worker speaks of legs that are not open here: it must not go on computing."""
        first = ", ".join(map(str, islice(unknown, UNKNOWN_LEGS_TOLD)))
        log.warning(
            "worker %s spoke of %d legs that are not open here: aborting them (%s%s)",
            self.worker.worker_id, len(unknown), first, ", ..." if len(unknown) > UNKNOWN_LEGS_TOLD else "",
        )  # fmt: skip
        self._to_abort.update(unknown)
        self._flush_soon()

    def _break(self, problem: TandemError) -> None:
        """The stream has ended, or could not be opened: every leg on it is over."""
        was_open, self._stream_id = self._stream_id != 0, 0
        if was_open or self._problem is None:
            log.warning("the step stream of worker %s is not open: %s", self.worker.worker_id, problem)
        self._problem = problem
        self._to_abort.clear()
        self._fail_all(problem)

    def _fail_all(self, problem: TandemError) -> None:
        legs, self._legs, self._unsent = self._legs, {}, []
        for leg in legs.values():
            # Each its own: an error takes in facts of the leg it ends.
            leg.fail(copied(problem))

    def _fail(self, leg: Leg, problem: TandemError) -> None:
        """End a leg from this side."""
        if leg.sink is not None:
            self.abort(leg)
            leg.fail(problem)

    # --- Starts and aborts, those of one turn of the loop in one call each

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        if self._is_closed:
            return
        if self._fresh:
            fresh, self._fresh = self._fresh, []
            self._timers.after(self._bounds.accept_s, lambda: self._give_up_unstarted(fresh))
            self._timers.after(self._bounds.slow_s, lambda: self._ask_about_unstarted(fresh))
        if self._problem is not None:
            # Not open, and it could not be opened a moment ago: another worker can take these legs at once.
            problem, unsent, self._unsent = self._problem, self._unsent, []
            for leg in unsent:
                self._legs.pop(leg.number, None)
                leg.fail(copied(problem))
            return
        if not self._stream_id:
            return
        unsent, self._unsent = [leg for leg in self._unsent if leg.sink is not None], []
        while unsent:
            first, unsent = batch(unsent)
            self._spawn(self._send_starts(first), "start-legs")
        if self._to_abort:
            numbers, self._to_abort = self._to_abort, {}
            self._spawn(self._send_aborts(list(numbers)), "abort-legs")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_starts(self, legs: Sequence[Leg]) -> None:
        starts = []
        for leg in legs:
            assert leg.start is not None, "a leg is sent once"
            starts.append(leg.start)
            leg.is_sent, leg.start = True, None
        stream_id = self._stream_id
        try:
            results = await self._calls.start_legs(self.worker, stream_id, starts)
        except Exception as defect:
            problem = self._as_told(defect)
            for leg in legs:
                # Whether the worker has it is not known: an abort of a leg it has not is passed over.
                leg.is_started = True
                self._fail(leg, copied(problem))
            return
        for leg, result in zip(legs, results, strict=True):
            self._answer(leg, result)

    def _answer(self, leg: Leg, result: leg2_pb2.LegStartResult) -> None:
        kind = result.WhichOneof("result")
        if kind == "refused":
            self._legs.pop(leg.number, None)
            leg.fail(from_status(result.refused))
            return
        leg.is_started = True
        if leg.sink is None:
            if leg.number in self._legs:
                self.abort(leg)
        elif kind is None:
            self._fail(leg, ServiceError(f"worker {self.worker.worker_id} answered a start with nothing known here"))
        else:
            try:
                leg.sink.accepted()
            except Exception as problem:
                self._drop_defective(leg, problem)

    async def _send_aborts(self, numbers: Sequence[int]) -> None:
        try:
            await self._calls.abort_legs(self.worker, self._stream_id, numbers)
        except Exception as problem:
            # What still speaks is aborted again, and what does not is over with its stream.
            log.info("worker %s did not take an abort: %s", self.worker.worker_id, self._as_told(problem))

    # --- Life

    def _give_up_unstarted(self, legs: Sequence[Leg]) -> None:
        for leg in legs:
            if not leg.is_started and leg.sink is not None:
                self._fail(leg, LegFailed(f"no answer within {self._bounds.accept_s:g} s"))

    def _ask_about_unstarted(self, legs: Sequence[Leg]) -> None:
        if any(not leg.is_started and leg.sink is not None for leg in legs):
            self._ask_once()

    def _look(self) -> None:
        """Whether anything was heard lately; the worker is asked before it is given up."""
        if self._has_spoken or not self._stream_id:
            self._has_spoken, self._silent_s, self._is_asked = False, 0.0, False
        else:
            self._silent_s += LOOK_S
        if self._silent_s >= self._bounds.silence_s:
            for leg in [leg for leg in self._legs.values() if leg.is_started]:
                self._fail(leg, LegFailed(f"nothing heard for {self._bounds.silence_s:g} s"))
        elif self._silent_s >= self._bounds.slow_s:
            self._ask_once()
        self._looking = self._timers.after(LOOK_S, self._look) if self._legs else None

    def _ask_once(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._spawn(self._ask(), f"slow-{self.worker.worker_id}")

    async def _ask(self) -> None:
        """Tell the legs of a worker that answers nothing, unless it has spoken meanwhile."""
        self._has_spoken = False
        has_answered = await self._answers(self.worker)
        if has_answered or self._has_spoken or not self._is_asked:
            self._is_asked = False
            return
        for leg in list(self._legs.values()):
            if leg.sink is not None:
                try:
                    leg.sink.unanswered()
                except Exception as problem:
                    self._drop_defective(leg, problem)

    def _look_for_the_lost(self) -> None:
        """Give up legs that the worker has ceased to name, and abort again those that it still names.

        A worker that says nothing at all is silent, which is another bound's business.
        """
        if not self._has_named:
            self._look_for_the_lost_later()
            return
        self._has_named = False
        for leg in list(self._legs.values()):
            leg.missed_count = 0 if leg.is_named or not leg.is_started else leg.missed_count + 1
            if leg.missed_count >= 2:
                self._legs.pop(leg.number)
                if leg.sink is not None:
                    self._fail(leg, LegFailed("the worker does not know of it any more"))
            elif leg.sink is None and leg.is_named and leg.is_started:
                self._to_abort[leg.number] = None
                self._flush_soon()
            leg.is_named = False
        self._look_for_the_lost_later()

    def _look_for_the_lost_later(self) -> None:
        self._naming = self._timers.after(NAMED_S, self._look_for_the_lost) if self._legs else None


def _defect(problem: Exception) -> TandemError:
    return TandemError(f"internal error in a leg: {type(problem).__name__}")


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
