"""The link to one start of a worker: its step stream, the legs on it, and the calls that start and abort them.

One loop reads the stream, splits each message by leg and calls the legs' sinks; nothing waits for a token. Owns the
legs' numbers, the batches of starts and aborts, and liveness: a worker without messages is silent, and a leg that it no
longer lists is lost. The sink decides what a failure means; a defect in one sink never affects another leg.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from itertools import islice
from typing import Any

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.client.step_calls import StepCall, WorkerCalls
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import LegFailed, ServiceError, TandemError
from tandem.observability.trace_context import Headers
from tandem.rpc.backoff import Backoff
from tandem.rpc.status import from_status
from tandem.service.awake_timers import AwakeTimers, Timer
from tandem_frontend.execution.link_leg import Bounds, Leg, Sink, batch, bug_in, copied, leg_start, report_failed
from tandem_frontend.execution.step_logprobs import by_leg

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.2
"""How often a link with legs checks whether a message has arrived."""
LIVENESS_INTERVAL_S = 1.0
LISTINGS_MISSED = 3
"""Listings in a row without a leg after which it is lost. Counted in the stream and not in time: where this process or
the worker has too little processor time, a listing comes late, and the leg is there. A worker lists the legs that have
had no tokens since its last listing."""
INTERVALS_MISSED = 10
"""Liveness intervals in a row without a leg after which it is lost: no listings arrive, or it never was in one."""
OPENING_S = 2.0
"""Timeout of opening a stream."""
STEADY_S = 1.0
"""A stream that was open for this long is reopened without back-off when it breaks."""
UNKNOWN_LEGS_MAX = 16_384
"""Most unknown legs in one message; a worker that lists more confuses this frontend with another one."""
UNKNOWN_LEGS_LOGGED = 5


class WorkerLink:
    """The link to one start of a worker, opened at once and kept open until `close`."""

    def __init__(
        self,
        worker: Worker,
        frontend_id: str,
        calls: WorkerCalls,
        bounds: Bounds,
        timers: AwakeTimers,
        check_health: Callable[[Worker], Awaitable[bool]],
        opening: asyncio.Semaphore,
    ) -> None:
        """`check_health` checks once whether a worker serves; `opening` bounds how many links open at a time.

        Raises:
            ServiceError: the worker cannot be connected to.
        """
        self.worker = worker
        """With its state in the latest view that listed it."""
        self._frontend_id = frontend_id
        self._calls = calls
        self.connection = calls.connection(worker)
        """The channel of its calls."""
        self._bounds = bounds
        self._timers = timers
        self._check_health = check_health
        self._opening = opening
        self._legs: dict[int, Leg] = {}
        self._next_number = 1
        self._stream_id = 0
        """0: the stream is not open."""
        self._opened_s = 0.0
        self._problem: TandemError | None = None
        """Why the stream is closed and the last try to open it failed; None: open, or not tried yet."""
        self._unsent: list[Leg] = []
        self._fresh: list[Leg] = []
        """Legs added in this turn of the event loop, whose timeouts have not been armed."""
        self._to_abort: dict[int, None] = {}
        self._is_flushing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_message = False
        """Whether a message has arrived since the last silence check."""
        self._has_listed = False
        """Whether a message has arrived since the last liveness check."""
        self._listings = 1
        """Messages that listed silent legs, counted from 1."""
        self._silent_s = 0.0
        self._is_checking = False
        """Whether the worker's health is being checked, or was found bad and no message has arrived since."""
        self._silence_timer: Timer | None = None
        self._liveness_timer: Timer | None = None
        self._is_closed = False
        # In a context of its own: it outlives the request that may have opened this link.
        self._reading = asyncio.create_task(
            self._keep_open(), name=f"steps-{worker.worker_id}", context=contextvars.Context()
        )

    @property
    def leg_count(self) -> int:
        """Legs that have not ended."""
        return len(self._legs)

    def start(self, request: leg_pb2.LegRequest, sink: Sink, timeout_s: float | None, headers: Headers) -> Leg:
        """Start a leg. Its events go to `sink`, never before this returns; failures too.

        Args:
            request: the leg.
            sink: receives its events.
            timeout_s: seconds left of the client's deadline; None: no deadline.
            headers: trace context of the leg.
        """
        number, self._next_number = self._next_number, self._next_number + 1
        leg = self._legs[number] = Leg(number, sink, leg_start(number, request, timeout_s, headers), self.abort)
        self._unsent.append(leg)
        self._fresh.append(leg)
        self._flush_soon()
        if self._silence_timer is None:
            self._silent_s, self._is_checking = 0.0, False
            self._silence_timer = self._timers.after(CHECK_INTERVAL_S, self._check_silence)
            self._liveness_timer = self._timers.after(LIVENESS_INTERVAL_S, self._check_liveness)
        return leg

    def abort(self, leg: Leg) -> None:
        """See `Leg.abort`."""
        if not leg.is_sent:
            self._legs.pop(leg.number, None)
        elif leg.is_started:
            self._to_abort[leg.number] = None
            self._flush_soon()
        # Otherwise StartLegs is in flight, and the worker may not know the leg yet: `_handle_result` aborts it.

    async def close(self) -> None:
        """Close the stream, which aborts what still runs on it. May be called twice."""
        self._is_closed = True
        for timer in (self._silence_timer, self._liveness_timer):
            if timer is not None:
                timer.cancel()
        tasks = {self._reading, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if self._problem is not None:
            log.info(
                "step stream to worker %s (epoch %d) is given up: that start of it is no longer used here",
                self.worker.worker_id, self.worker.epoch,
            )  # fmt: skip
            self._problem = None
        self._fail_all(ServiceError(f"the link to worker {self.worker.worker_id} was closed"))

    # --- The stream

    async def _keep_open(self) -> None:
        """Read the stream until cancelled, and reopen it after any error."""
        backoff, loop = Backoff(), asyncio.get_running_loop()
        while True:
            try:
                await self._read_stream()
            except Exception as problem:  # a defect must not end the task that reconnects
                if self._stream_id and loop.time() - self._opened_s >= STEADY_S:
                    backoff.reset()
                self._break(self._as_error(problem))
            await asyncio.sleep(backoff.next_s())

    def _as_error(self, problem: Exception) -> TandemError:
        """The error of a failed call. gRPC raises errors of its own for malformed messages."""
        if isinstance(problem, TandemError):
            return problem
        log.error("unreadable message from worker %s", self.worker.worker_id, exc_info=problem)
        what = f"{type(problem).__name__}: {problem}"
        return ServiceError(f"unreadable message from worker {self.worker.worker_id} ({what})")

    async def _read_stream(self) -> None:
        """Open the stream and read it to its end, which is always an error."""
        call: StepCall | None = None
        try:
            async with self._opening:
                call = self._calls.open_steps(self.worker, self._frontend_id)
                first = await self._first_message(call)
            if first.stream_id < 1:
                raise ServiceError(
                    f"worker {self.worker.worker_id} opened a step stream without an id: it may run another release"
                )
            if self._problem is not None:
                log.info("step stream to worker %s is open again", self.worker.worker_id)
            self._stream_id, self._problem = first.stream_id, None
            self._opened_s = asyncio.get_running_loop().time()
            self._flush()
            while True:
                self.take(await call.read())
        finally:
            if call is not None:
                call.cancel()

    async def _first_message(self, call: StepCall) -> StreamStepsResponse:
        """Read the first message in time: a frozen worker accepts connections, and other links wait to open."""
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
                raise ServiceError(
                    f"worker {self.worker.worker_id} did not open its step stream within {OPENING_S:g} s"
                ) from None
            raise
        finally:
            timer.cancel()

    def take(self, message: StreamStepsResponse) -> None:
        """Split a message by leg and call the legs' sinks.

        Raises:
            ServiceError: its lists have different lengths, so that it cannot be split; or it lists too many unknown
                legs.
        """
        self._has_message = self._has_listed = True
        unknown: dict[int, None] = {}
        if message.alive:
            self._listings += 1
        if message.legs or message.token_ids or message.indices or message.counts or message.logprobs:
            self._take_tokens(message, unknown)
        for number in message.alive:
            leg = self._legs.get(number)
            if leg is not None:
                leg.is_alive, leg.listed_in = True, self._listings
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
            raise ServiceError(f"worker {self.worker.worker_id} sent a step whose lists differ in length")
        logprobs: dict[int, Iterator[generation_pb2.TokenLogprob]] = {}
        if message.logprobs:
            logprobs, misfits = by_leg(message, numbers, counts)
            self._fail_misfits(misfits, unknown)
        legs, listings, begin = self._legs, self._listings, 0
        for number, index, count in zip(numbers, indices, counts, strict=True):
            end = begin + count
            leg = legs.get(number)
            if leg is None:
                self._note_unknown(number, unknown)
            else:
                leg.is_alive, leg.listed_in = True, listings
                if leg.sink is not None:
                    own = list(islice(logprobs[number], count)) if number in logprobs else ()
                    try:
                        leg.sink.tokens(index, token_ids[begin:end], own)
                    except Exception as problem:  # a defect of one sink must not end the other legs
                        self._drop_defective(leg, problem)
            begin = end

    def _end(self, end: leg2_pb2.LegEnd) -> None:
        leg = self._legs.pop(end.leg, None)
        if leg is None:
            log.debug(
                "worker %s reported the end of leg %d, which this frontend has ended already",
                self.worker.worker_id,
                end.leg,
            )
            return
        sink, leg.sink = leg.sink, None
        if sink is None:
            return
        if end.WhichOneof("end") != "finish":
            report_failed(sink, from_status(end.failure))
            return
        try:
            sink.finish(end.finish)
        except Exception as problem:  # a defect of one sink must not end the other legs
            report_failed(sink, bug_in("the finish of a leg", self.worker.worker_id, problem))

    def _fail_misfits(self, misfits: dict[int, str], unknown: dict[int, None]) -> None:
        """Fail legs that have not as many log probabilities as tokens."""
        for number, problem in misfits.items():
            leg = self._legs.get(number)
            if leg is None:
                self._note_unknown(number, unknown)
            else:
                self._fail(leg, LegFailed(problem))

    def _drop_defective(self, leg: Leg, problem: Exception) -> None:
        """Fail the one leg whose sink has raised."""
        self._fail(leg, bug_in("an event of a leg", self.worker.worker_id, problem))

    def _note_unknown(self, number: int, unknown: dict[int, None]) -> None:
        unknown[number] = None
        if len(unknown) > UNKNOWN_LEGS_MAX:
            raise ServiceError(
                f"worker {self.worker.worker_id} listed more than {UNKNOWN_LEGS_MAX} legs that this frontend did not"
                f" start: another frontend may have the same id ({self._frontend_id})"
            )

    def _abort_unknown(self, unknown: dict[int, None]) -> None:
        """Abort legs that only the worker knows: it must not go on computing them."""
        first = ", ".join(map(str, islice(unknown, UNKNOWN_LEGS_LOGGED)))
        log.warning(
            "worker %s runs %d legs that this frontend has ended or did not start: aborting them there, no request is"
            " affected (leg numbers %s%s)",
            self.worker.worker_id, len(unknown), first, ", ..." if len(unknown) > UNKNOWN_LEGS_LOGGED else "",
        )  # fmt: skip
        self._to_abort.update(unknown)
        self._flush_soon()

    def _break(self, problem: TandemError) -> None:
        """Fail every leg: the stream has ended, or could not be opened."""
        was_open, self._stream_id = self._stream_id != 0, 0
        if was_open or self._problem is None:
            # Once per outage, not once per try.
            what = "broke" if was_open else "could not be opened"
            level = logging.INFO if self.worker.state is WorkerState.DRAINING else logging.WARNING
            log.log(
                level, "step stream to worker %s (epoch %d) %s, retrying; its legs continue elsewhere if they can: %s",
                self.worker.worker_id, self.worker.epoch, what, problem,
            )  # fmt: skip
        self._problem = problem
        self._to_abort.clear()
        self._fail_all(problem)

    def _fail_all(self, problem: TandemError) -> None:
        legs, self._legs, self._unsent = self._legs, {}, []
        for leg in legs.values():
            # A copy for each: an error collects metadata of the leg that it ends.
            leg.fail(copied(problem))

    def _fail(self, leg: Leg, problem: TandemError) -> None:
        """Abort a leg in its engine and fail it here."""
        if leg.sink is not None:
            self.abort(leg)
            leg.fail(problem)

    # --- Starts and aborts: those of one turn of the event loop go into one call each

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
            self._timers.after(self._bounds.accept_s, lambda: self._fail_unstarted(fresh))
            self._timers.after(self._bounds.slow_s, lambda: self._check_unstarted(fresh))
        if self._problem is not None:
            # The last try to open the stream failed: fail now, so that another worker can serve these requests.
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
        except Exception as defect:  # every leg of the call must get an error
            problem = self._as_error(defect)
            for leg in legs:
                # The worker may have it; an abort of an unknown leg is ignored there.
                leg.is_started = True
                self._fail(leg, copied(problem))
            return
        for leg, result in zip(legs, results, strict=True):
            self._handle_result(leg, result)

    def _handle_result(self, leg: Leg, result: leg2_pb2.LegStartResult) -> None:
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
            self._fail(leg, ServiceError(f"worker {self.worker.worker_id} sent an unknown result for a leg's start"))
        else:
            try:
                leg.sink.accepted()
            except Exception as problem:  # a defect of one sink must not end the other legs
                self._drop_defective(leg, problem)

    async def _send_aborts(self, numbers: Sequence[int]) -> None:
        try:
            await self._calls.abort_legs(self.worker, self._stream_id, numbers)
        except Exception as problem:
            # The liveness check repeats it for legs that the worker still lists.
            log.info(
                "worker %s did not accept an abort, which is repeated while it lists the legs: %s",
                self.worker.worker_id,
                self._as_error(problem),
            )

    # --- Liveness

    def _fail_unstarted(self, legs: Sequence[Leg]) -> None:
        for leg in legs:
            if not leg.is_started and leg.sink is not None:
                self._fail(leg, LegFailed(f"leg not accepted within {self._bounds.accept_s:g} s"))

    def _check_unstarted(self, legs: Sequence[Leg]) -> None:
        if any(not leg.is_started and leg.sink is not None for leg in legs):
            self._check_health_once()

    def _check_silence(self) -> None:
        """Fail all legs of a silent worker; its health is checked some time before."""
        if self._has_message or not self._stream_id:
            self._has_message, self._silent_s, self._is_checking = False, 0.0, False
        else:
            self._silent_s += CHECK_INTERVAL_S
        if self._silent_s >= self._bounds.silence_s:
            for leg in [leg for leg in self._legs.values() if leg.is_started]:
                self._fail(leg, LegFailed(f"no message from the worker for {self._bounds.silence_s:g} s"))
        elif self._silent_s >= self._bounds.slow_s:
            self._check_health_once()
        self._silence_timer = self._timers.after(CHECK_INTERVAL_S, self._check_silence) if self._legs else None

    def _check_health_once(self) -> None:
        if not self._is_checking:
            self._is_checking = True
            self._spawn(self._check_worker(), f"slow-{self.worker.worker_id}")

    async def _check_worker(self) -> None:
        """Check a slow worker's health, and report it to its legs as unresponsive unless a message has arrived."""
        self._has_message = False
        is_healthy = await self._check_health(self.worker)
        if is_healthy or self._has_message or not self._is_checking:
            self._is_checking = False
            return
        for leg in list(self._legs.values()):
            if leg.sink is not None:
                try:
                    leg.sink.unresponsive()
                except Exception as problem:  # a defect of one sink must not end the other legs
                    self._drop_defective(leg, problem)

    def _check_liveness(self) -> None:
        """Fail legs that the worker no longer lists, and repeat the abort of aborted legs that it still lists.

        Without any message the worker is silent, which `_check_silence` handles.
        """
        if not self._has_listed:
            self._check_liveness_later()
            return
        self._has_listed = False
        for leg in list(self._legs.values()):
            leg.missed_count = 0 if leg.is_alive or not leg.is_started else leg.missed_count + 1
            was_missed = leg.listed_in and self._listings - leg.listed_in >= LISTINGS_MISSED
            if was_missed or leg.missed_count >= INTERVALS_MISSED:
                self._legs.pop(leg.number)
                if leg.sink is not None:
                    self._fail(
                        leg, LegFailed("the worker no longer lists this leg: it lost it, or ended it without saying so")
                    )
            elif leg.sink is None and leg.is_alive and leg.is_started:
                self._to_abort[leg.number] = None
                self._flush_soon()
            leg.is_alive = False
        self._check_liveness_later()

    def _check_liveness_later(self) -> None:
        self._liveness_timer = self._timers.after(LIVENESS_INTERVAL_S, self._check_liveness) if self._legs else None
