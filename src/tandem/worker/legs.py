"""The worker's open legs: admission checks, mapping to engine requests, deadlines, aborts and ends.

Owns the checks that need no engine (epoch, model, drain), the table of open legs, their deadlines, and the metadata of
a leg's error (leg, worker, attempt, room). `identity` owns the epoch, `steps` the token stream; the engine's request
arrives ready-made as an EngineRequest. Each accepted leg ends exactly once: finish, error or abort.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tandem.domain.adapter import Adapter
from tandem.domain.generation import EngineFinish, EngineRequest, FinishReason, TokenLogprob
from tandem.domain.worker import Worker, WorkerRole
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
from tandem.observability.trace_store import TraceStore, fail
from tandem.rpc.convert import finish_to_proto
from tandem.rpc.status import to_status
from tandem.service.awake_timers import AwakeTimers, Timer
from tandem.worker.identity import Identity
from tandem.worker.steps import StepStream
from tandem.worker.unfinished_prompts import PromptCount

LegKey = tuple[str, int]
"""Request id and attempt: labels. Clients may repeat a request id, so several open legs may have the same labels."""


class OpenLeg:
    """One accepted leg: forwards the engine's output to a step stream. An `engine.port.Output`."""

    __slots__ = (
        "_ending",
        "_index",
        "_legs",
        "adapter",
        "deadline",
        "engine_id",
        "is_over",
        "key",
        "number",
        "record",
        "room",
        "stream",
        "unfinished_tokens",
    )

    def __init__(self, legs: Legs, key: LegKey, request: EngineRequest, stream: StepStream, number: int) -> None:
        self._legs = legs
        self.key = key
        self.engine_id = request.request_id
        self.adapter = request.adapter
        self.room = request.bootstrap.room if request.bootstrap else None
        self.stream = stream
        self.number = number
        self.record: LegTrace = legs.new_record(key, request)
        self.deadline: Timer | None = None
        self.is_over = False
        """It has ended on its stream, or was not accepted: further output of the engine is ignored."""
        self.unfinished_tokens: int | None = None
        """Of its prompt, until that is computed; None: computed, or another worker computes it."""
        self._index = 0
        self._ending: TandemError | None = None
        """The error that this worker aborted it with (its deadline passed); None otherwise."""

    def tokens(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """See the port. Hot path: called once per leg and engine step."""
        if self.is_over:
            return
        if self.unfinished_tokens is not None:
            self._legs.end_prompt(self)
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
        fail(self.record, problem)
        self._legs.forget(self)
        self.stream.fail(self.number, to_status(problem))

    def leave(self) -> None:
        """Record that the frontend aborted the leg or disconnected."""
        self.record.left_s = self.record.clock()

    def end_with(self, problem: TandemError) -> None:
        """Report the abort that is about to follow as this error."""
        self._ending = problem


def engine_id(key: LegKey, stream_id: int, number: int) -> str:
    """The id of a leg in its engine, unique in this worker; it begins with the leg's labels, for a reader of logs."""
    return f"{key[0]}.{key[1]}.{stream_id}-{number}"


def defect_of(problem: Exception) -> TandemError:
    """The message that a frontend gets for an error that is none of Tandem's."""
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
        """`records` stores each leg's trace; None: traces are discarded."""
        self._records: TraceStore[LegTrace] = records or TraceStore()
        self._timers = timers or AwakeTimers()
        self._engine = engine
        self._identity = identity
        self._open: dict[tuple[int, int], OpenLeg] = {}
        """Open legs by stream id and leg number, which no two legs share."""
        self._is_closed = False
        self.prompts = PromptCount()
        """Those that are not computed yet."""
        self.batch_count = 0
        """Engine outputs since start; the health check takes growth as proof that the engine works."""
        self._changed = asyncio.Event()

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self._identity.current().worker_id

    @property
    def open_count(self) -> int:
        """Number of legs that have not ended yet."""
        return len(self._open)

    @property
    def computes_prompts(self) -> bool:
        """Whether this worker's engine computes prompts, and does not get their KV from another one."""
        return self._identity.current().role is not WorkerRole.DECODE

    @property
    def adapter_count(self) -> int:
        """Number of adapters that the worker serves."""
        return len(self._identity.current().adapters)

    def check_epoch(self, worker_epoch: int) -> None:
        """Reject a call that was addressed to another incarnation of this worker.

        Raises:
            StaleEpoch: `worker_epoch` is not the current epoch.
        """
        worker = self._identity.current()
        if worker_epoch != worker.epoch:
            raise StaleEpoch(
                f"stale epoch: worker {worker.worker_id} has epoch {worker.epoch}, the call has {worker_epoch}",
                worker=worker.worker_id,
                expected=worker_epoch,
                actual=worker.epoch,
            )

    def check_admission(self) -> None:
        """Reject new work once the drain has closed admission.

        Raises:
            Draining: admission is closed.
        """
        if self._is_closed:
            worker = self._identity.current()
            raise Draining(f"worker {worker.worker_id} is draining and accepts no legs", worker=worker.worker_id)

    def admit(self, worker_epoch: int, model: str, adapter: Adapter | None = None) -> Worker:
        """Check that a leg may start on this worker, and return the worker.

        Raises:
            StaleEpoch: the leg was addressed to another incarnation of this worker.
            ModelNotFound: this worker serves another model, or not that adapter with these weights.
            Draining: admission is closed.
        """
        self.check_epoch(worker_epoch)
        worker = self._identity.current()
        if model != worker.capabilities.model:
            raise ModelNotFound(
                f"worker {worker.worker_id} serves {worker.capabilities.model}, not {model}", model=model
            )
        if adapter is not None and adapter not in worker.adapters:
            raise ModelNotFound(
                f"worker {worker.worker_id} does not serve adapter {adapter.name}, or has other weights of it",
                model=adapter.name,
            )
        self.check_admission()
        return worker

    async def start(
        self,
        key: LegKey,
        request: EngineRequest,
        stream: StepStream,
        number: int,
        *,
        parent: TraceContext | None = None,
        timeout_s: float | None = None,
        expected_cached_tokens: int = 0,
    ) -> None:
        """Start an admitted leg; return when the engine has accepted it. Its end is reported on the stream.

        Args:
            key: request id and attempt; other open legs may have the same.
            request: the engine's request; it gets an id that is unique in this worker.
            stream: receives its tokens and its end.
            number: the leg's number on the stream, chosen by the frontend.
            parent: the caller's span.
            timeout_s: the leg is aborted and ends with DeadlinePassed after this time; None: no deadline.
            expected_cached_tokens: of the prompt, as the caller expects; for load reports.

        Raises:
            InvalidRequest: the number is in use, or the engine rejects a value.
            TandemError: the engine cannot accept it; metadata has leg, worker, attempt and room.
        """
        place = (stream.stream_id, number)
        if number < 1 or place in self._open:
            raise InvalidRequest("leg", f"must be at least 1 and not in use on this stream, not {number}")
        request = replace(request, request_id=engine_id(key, *place))
        leg = self._begin(OpenLeg(self, key, request, stream, number), parent)
        if self.computes_prompts:
            leg.unfinished_tokens = max(0, len(request.token_ids) - expected_cached_tokens)
            self.prompts.begin(leg.unfinished_tokens)
        try:
            await self._engine.submit(self._traced(request, leg.record), leg)
        except BaseException as problem:  # a cancelled start must free the leg too
            stream.drop_leg(number)
            if isinstance(problem, TandemError):
                self.locate(problem, leg)
                fail(leg.record, problem)
            elif isinstance(problem, Exception):
                fail(leg.record, defect_of(problem))
            self.forget(leg)
            raise
        if stream.is_closed:
            self._leave(leg)
        elif timeout_s is not None and place in self._open:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            leg.deadline = self._timers.at(deadline_s, lambda: self._expire(leg))

    def abort(self, request_id: str, attempt: int | None) -> int:
        """Abort the legs of all requests with that id, of one attempt or (None) all. Returns how many were aborted."""
        found = [leg for leg in self._open.values() if leg.key[0] == request_id and attempt in (None, leg.key[1])]
        return sum([self._engine.abort(leg.engine_id) for leg in found])

    def abort_numbered(self, stream_id: int, numbers: Iterable[int]) -> int:
        """Abort legs of a stream by number. Returns how many of them were open."""
        found = [leg for number in numbers if (leg := self._open.get((stream_id, number))) is not None]
        for leg in found:
            self._leave(leg)
        return len(found)

    def abort_stream(self, stream: StepStream) -> None:
        """Abort all legs of a stream that has ended."""
        for leg in [leg for leg in self._open.values() if leg.stream is stream]:
            self._leave(leg)

    def close_admission(self) -> None:
        """Reject new legs from now on."""
        self._is_closed = True

    def open_admission(self) -> None:
        """Accept new legs again."""
        self._is_closed = False

    async def wait_changed(self) -> None:
        """Return when a leg has started or ended since the call."""
        await self._changed.wait()

    async def wait_none(self) -> None:
        """Return when no leg is open."""
        while self._open:
            await self._changed.wait()

    async def wait_none_of(self, adapter: Adapter) -> None:
        """Return when no open leg uses an adapter."""
        while any(leg.adapter == adapter for leg in self._open.values()):
            await self._changed.wait()

    # --- For the legs themselves

    def new_record(self, key: LegKey, request: EngineRequest) -> LegTrace:
        """A trace for a leg that is about to start."""
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
        """Remove a leg that has ended and close its trace."""
        if leg.is_over:
            return
        leg.is_over = True
        self.end_prompt(leg)
        del self._open[leg.stream.stream_id, leg.number]
        if leg.deadline is not None:
            leg.deadline.cancel()
        self._records.close(leg.record)
        self._notify()

    def end_prompt(self, leg: OpenLeg) -> None:
        """A leg's prompt is computed, or needs no computation any more. May be called twice."""
        tokens, leg.unfinished_tokens = leg.unfinished_tokens, None
        if tokens is not None:
            self.prompts.end(tokens)

    def locate(self, problem: TandemError, leg: OpenLeg) -> None:
        """Add leg, worker, attempt and room to an error that the request itself did not cause."""
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
        self._open[leg.stream.stream_id, leg.number] = leg
        leg.record.parent = parent
        self._records.begin(leg.record)
        self._notify()
        # Before submit: the engine may emit the first token before submit() returns.
        leg.stream.open_leg(leg.number)
        return leg

    def _leave(self, leg: OpenLeg) -> None:
        leg.leave()
        self._engine.abort(leg.engine_id)

    def _expire(self, leg: OpenLeg) -> None:
        leg.end_with(DeadlinePassed("request deadline exceeded"))
        self._engine.abort(leg.engine_id)

    def _traced(self, request: EngineRequest, record: LegTrace) -> EngineRequest:
        """Add trace headers, so that the engine's spans become children of the leg's span (if it is sampled)."""
        if self._records.ids is None or record.span_context is None or not record.span_context.is_sampled:
            return request
        return replace(request, trace_headers=dict(record.span_context.headers()))

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
