"""The legs a worker has open: who asked for them, which engine request each one is, and how they end.

Owns the checks that need no engine (epoch, model, drain), the table of open legs, their deadlines, and the facts an
error carries (leg, worker, attempt, room). Which epoch counts is `identity`'s; how tokens travel is `steps`'. What a
leg asks of the engine comes in as an EngineRequest. Each leg that was taken ends exactly once, whatever ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tandem.domain.generation import EngineFinish, EngineRequest, FinishReason, TokenLogprob
from tandem.engine.port import Engine
from tandem.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    InvalidRequest,
    LegFailed,
    ModelNotFound,
    StaleEpoch,
    TandemError,
)
from tandem.observability.request_trace import LegTrace
from tandem.observability.trace_context import TraceContext
from tandem.observability.trace_store import TraceStore, message_of
from tandem.rpc.convert import finish_to_proto
from tandem.rpc.status import to_status
from tandem.service.awake_timers import AwakeTimers, Timer
from tandem.worker.identity import Identity
from tandem.worker.steps import StepStream

LegKey = tuple[str, int]
"""Request id and attempt."""


class OpenLeg:
    """One leg that was taken: the engine's output on its way to a step stream. An `engine.port.Output`."""

    __slots__ = (
        "_ending",
        "_index",
        "_legs",
        "deadline",
        "is_over",
        "key",
        "number",
        "record",
        "request_id",
        "room",
        "stream",
    )

    def __init__(self, legs: Legs, key: LegKey, request: EngineRequest, stream: StepStream, number: int) -> None:
        self._legs = legs
        self.key = key
        self.request_id = request.request_id
        self.room = request.bootstrap.room if request.bootstrap else None
        self.stream = stream
        self.number = number
        self.record: LegTrace = legs.new_record(key, request)
        self.deadline: Timer | None = None
        self.is_over = False
        """It has ended on its stream, or was not taken: what the engine still says is passed over."""
        self._index = 0
        self._ending: TandemError | None = None
        """Why this side has aborted it, where that is an error."""

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """See the port. On the hot path: once a leg and step."""
        if self.is_over:
            return
        record, count = self.record, len(token_ids)
        self._legs.batch_count += 1
        record.note_tokens(record.clock(), count)
        self.stream.tokens(self.number, self._index, token_ids, logprobs)
        self._index += count

    def finish(self, finish: EngineFinish) -> None:
        """See the port."""
        if self.is_over:
            return
        if finish.reason is FinishReason.ABORTED and self._ending is not None:
            self.fail(self._ending)
            return
        self._legs.batch_count += 1
        if self.record.left_s is None:
            self.record.finish(finish)
        else:
            self.record.cancel()
        self._legs.forget(self)
        self.stream.finish(self.number, finish_to_proto(finish))

    def fail(self, problem: TandemError) -> None:
        """See the port."""
        if self.is_over:
            return
        self._legs.locate(problem, self)
        self.record.fail(problem.reason, message_of(problem))
        self._legs.forget(self)
        self.stream.fail(self.number, to_status(problem))

    def leave(self) -> None:
        """The frontend does not want it any more, or is gone."""
        self.record.left_s = self.record.clock()

    def end_with(self, problem: TandemError) -> None:
        """Its abort, which is about to come, is this error."""
        self._ending = problem


def defect_of(problem: Exception) -> TandemError:
    """What a frontend is told of an error that is none of Tandem's."""
    return TandemError(f"internal error at the start of a leg: {type(problem).__name__}")


class Legs:
    """Open legs of one worker."""

    def __init__(
        self,
        engine: Engine,
        identity: Identity,
        records: TraceStore[LegTrace] | None = None,
        timers: AwakeTimers | None = None,
    ) -> None:
        """`records` keeps what happened to each leg; None: nothing is kept."""
        self._records: TraceStore[LegTrace] = records or TraceStore()
        self._timers = timers or AwakeTimers()
        self._engine = engine
        self._identity = identity
        self._open: dict[LegKey, OpenLeg] = {}
        self._numbered: dict[tuple[int, int], OpenLeg] = {}
        """The same by stream and number."""
        self._is_closed = False
        self.batch_count = 0
        """Outputs of the engine since the start: while it grows, the engine works."""
        self._changed = asyncio.Event()

    @property
    def worker_id(self) -> str:
        """The worker."""
        return self._identity.current().worker_id

    @property
    def open_count(self) -> int:
        """Legs that have not ended yet."""
        return len(self._open)

    def check_epoch(self, worker_epoch: int) -> None:
        """Refuse what was meant for another start of this worker.

        Raises:
            StaleEpoch
        """
        worker = self._identity.current()
        if worker_epoch != worker.epoch:
            raise StaleEpoch(
                f"worker {worker.worker_id} is now in epoch {worker.epoch}, not {worker_epoch}",
                worker=worker.worker_id,
                expected=worker_epoch,
                actual=worker.epoch,
            )

    def check_admission(self) -> None:
        """Refuse everything after the end of admission.

        Raises:
            Draining
        """
        if self._is_closed:
            worker = self._identity.current()
            raise Draining(f"worker {worker.worker_id} is going away", worker=worker.worker_id)

    def admit(self, worker_epoch: int, model: str) -> None:
        """Refuse a leg for another start or another model, or after the end of admission.

        Raises:
            StaleEpoch, ModelNotFound, Draining
        """
        self.check_epoch(worker_epoch)
        worker = self._identity.current()
        if model != worker.capabilities.model:
            raise ModelNotFound(
                f"worker {worker.worker_id} serves {worker.capabilities.model}, not {model}", model=model
            )
        self.check_admission()

    async def start(
        self,
        key: LegKey,
        request: EngineRequest,
        stream: StepStream,
        number: int,
        *,
        parent: TraceContext | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Start a leg that was admitted; returns when the engine has taken it. Its end comes on the stream.

        Args:
            key: which attempt of which request.
            request: what the engine is asked for.
            stream: where its tokens and its end go.
            number: of the leg on the stream.
            parent: the caller's span.
            timeout_s: after so long the leg is aborted, and ends with DeadlinePassed; None: no deadline.

        Raises:
            InvalidRequest: this attempt of the request runs here already, or the engine refuses a value.
            TandemError: the engine cannot take it; with leg, worker, attempt and room.
        """
        if key in self._open:
            raise InvalidRequest("request_id", f"attempt {key[1]} of {key[0]} runs already")
        if number < 1 or (stream.stream_id, number) in self._numbered:
            raise InvalidRequest("leg", f"{number} is no new number on this stream")
        leg = self._begin(OpenLeg(self, key, request, stream, number), parent)
        try:
            await self._engine.submit(self._traced(request, leg.record), leg)
        except BaseException as problem:
            stream.drop_leg(number)
            if isinstance(problem, TandemError):
                self.locate(problem, leg)
                leg.record.fail(problem.reason, message_of(problem))
            elif isinstance(problem, Exception):
                leg.record.fail(TandemError.reason, message_of(defect_of(problem)))
            self.forget(leg)
            raise
        if stream.is_closed:
            self._leave(leg)
        elif timeout_s is not None and key in self._open:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            leg.deadline = self._timers.at(deadline_s, lambda: self._expire(leg))

    def abort(self, request_id: str, attempt: int | None) -> int:
        """End the legs of a request, all attempts or one. Returns how many there were."""
        found = [
            leg
            for (known_id, known_attempt), leg in self._open.items()
            if known_id == request_id and attempt in (None, known_attempt)
        ]
        return sum([self._engine.abort(leg.request_id) for leg in found])

    def abort_numbered(self, stream_id: int, numbers: Iterable[int]) -> int:
        """End legs of a stream that its frontend does not want any more. Returns how many were open."""
        found = [leg for number in numbers if (leg := self._numbered.get((stream_id, number))) is not None]
        for leg in found:
            self._leave(leg)
        return len(found)

    def abort_stream(self, stream: StepStream) -> None:
        """End all legs of a stream that has ended."""
        for leg in [leg for leg in self._open.values() if leg.stream is stream]:
            self._leave(leg)

    def close_admission(self) -> None:
        """Take no more legs."""
        self._is_closed = True

    async def wait_changed(self) -> None:
        """Return when a leg has come or gone since the call."""
        await self._changed.wait()

    async def wait_none(self) -> None:
        """Return when no leg is open."""
        while self._open:
            await self._changed.wait()

    # --- For the legs themselves

    def new_record(self, key: LegKey, request: EngineRequest) -> LegTrace:
        """The record of a leg that begins."""
        worker = self._identity.current()
        return LegTrace(
            request_id=key[0],
            attempt=key[1],
            role=worker.role.value,
            worker_id=worker.worker_id,
            epoch=worker.epoch,
            model=worker.capabilities.model,
            room=request.bootstrap.room if request.bootstrap else 0,
            prompt_tokens=len(request.token_ids),
        )

    def forget(self, leg: OpenLeg) -> None:
        """A leg has ended, and its record says how."""
        if leg.is_over:
            return
        leg.is_over = True
        del self._open[leg.key]
        del self._numbered[leg.stream.stream_id, leg.number]
        if leg.deadline is not None:
            leg.deadline.cancel()
        self._records.close(leg.record)
        self._notify()

    def locate(self, problem: TandemError, leg: OpenLeg) -> None:
        """Say where a leg failed, where that is not the request's fault."""
        if not isinstance(problem, LegFailed | EngineFailed):
            return
        worker = self._identity.current()
        facts: dict[str, Any] = {
            "leg": worker.role.value,
            "worker": worker.worker_id,
            "attempt": leg.key[1],
            "room": leg.room,
        }
        for name, value in facts.items():
            if value is not None:
                problem.metadata.setdefault(name, str(value))

    def _begin(self, leg: OpenLeg, parent: TraceContext | None) -> OpenLeg:
        self._open[leg.key] = self._numbered[leg.stream.stream_id, leg.number] = leg
        leg.record.parent = parent
        self._records.begin(leg.record)
        self._notify()
        # Before the engine has it: the first token may come before the engine says that it has taken the leg.
        leg.stream.open_leg(leg.number)
        return leg

    def _leave(self, leg: OpenLeg) -> None:
        leg.leave()
        self._engine.abort(leg.request_id)

    def _expire(self, leg: OpenLeg) -> None:
        leg.end_with(DeadlinePassed("the request's deadline has passed"))
        self._engine.abort(leg.request_id)

    def _traced(self, request: EngineRequest, record: LegTrace) -> EngineRequest:
        """With what makes the leg's span the parent of the engine's own, where spans are exported."""
        if self._records.ids is None or record.span_context is None or not record.span_context.is_sampled:
            return request
        return replace(request, trace_headers=dict(record.span_context.headers()))

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
