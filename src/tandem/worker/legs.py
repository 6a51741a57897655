"""The legs a worker has open: who asked for them, which engine request each one is, and how they end.

Owns the checks that need no engine (epoch, model, drain), the table of open legs, and the facts an error carries
(leg, worker, attempt, room). Which epoch counts is `identity`'s. Knows no gRPC and no role: what a leg asks of the
engine comes in as an EngineRequest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, cast

from tandem.engine.port import Engine
from tandem.errors import Draining, EngineFailed, InvalidRequest, LegFailed, ModelNotFound, StaleEpoch, TandemError
from tandem.model.generation import EngineRequest, TokenBatch
from tandem.observe.course import LegCourse
from tandem.observe.courses import Courses
from tandem.observe.trace_context import TraceContext
from tandem.worker.identity import Identity

LegKey = tuple[str, int]
"""Request id and attempt."""


class Legs:
    """Open legs of one worker."""

    def __init__(self, engine: Engine, identity: Identity, courses: Courses[LegCourse] | None = None) -> None:
        """`courses` is told of every leg that runs; None: nobody wants to know."""
        self._courses: Courses[LegCourse] = courses or Courses()
        self._engine = engine
        self._identity = identity
        self._open: dict[LegKey, str] = {}
        self._running: dict[LegKey, LegCourse] = {}
        self._is_closed = False
        self.batch_count = 0
        """Batches the engine has answered with since the start: while it grows, the engine works."""
        self._changed = asyncio.Event()

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
        if self._is_closed:
            raise Draining(f"worker {worker.worker_id} is going away", worker=worker.worker_id)

    async def run(
        self, key: LegKey, request: EngineRequest, parent: TraceContext | None = None
    ) -> AsyncGenerator[TokenBatch, None]:
        """Run one leg; closing this, or cancelling its reader, aborts it in the engine.

        Args:
            key: which attempt of which request.
            request: what the engine is asked for.
            parent: the caller's span.

        Raises:
            InvalidRequest: this attempt of the request is here already, or the engine refuses a value.
            LegFailed, EngineFailed: with leg, worker, attempt and room.
        """
        if key in self._open:
            raise InvalidRequest("request_id", f"attempt {key[1]} of {key[0]} runs already")
        self._open[key] = request.request_id
        self._notify()
        try:
            with self._courses.following(self._course(key, request, parent)) as course:
                self._running[key] = course
                # Every adapter's iterator is a generator; only a generator can be told to end now.
                traced = self._traced(request, course)
                batches = cast("AsyncGenerator[TokenBatch, None]", self._engine.generate(traced))
                async with contextlib.aclosing(batches):
                    async for batch in batches:
                        self.batch_count += 1
                        _note(course, batch)
                        yield batch
        except (LegFailed, EngineFailed) as problem:
            raise self._located(problem, key, request) from None
        finally:
            del self._open[key]
            self._running.pop(key, None)
            self._notify()

    async def abort(self, request_id: str, attempt: int | None) -> int:
        """End the legs of a request, all attempts or one. Returns how many there were."""
        engine_ids = [
            engine_id
            for (known_id, known_attempt), engine_id in self._open.items()
            if known_id == request_id and attempt in (None, known_attempt)
        ]
        return sum([await self._engine.abort(engine_id) for engine_id in engine_ids])

    def leaving(self, key: LegKey) -> None:
        """Whoever asked for a leg has left, and it is about to be closed."""
        course = self._running.get(key)
        if course is not None:
            course.left_s = course.clock()

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

    def _traced(self, request: EngineRequest, course: LegCourse) -> EngineRequest:
        """With what makes the leg's span the parent of the engine's own, where spans are exported."""
        if self._courses.ids is None or course.trace is None or not course.trace.is_sampled:
            return request
        return replace(request, trace_headers=dict(course.trace.headers()))

    def _course(self, key: LegKey, request: EngineRequest, parent: TraceContext | None) -> LegCourse:
        worker = self._identity.current()
        return LegCourse(
            request_id=key[0],
            attempt=key[1],
            role=worker.role.value,
            worker_id=worker.worker_id,
            epoch=worker.epoch,
            model=worker.capabilities.model,
            room=request.bootstrap.room if request.bootstrap else 0,
            parent=parent,
            prompt_tokens=len(request.token_ids),
        )

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _located(self, problem: TandemError, key: LegKey, request: EngineRequest) -> TandemError:
        worker = self._identity.current()
        facts: dict[str, Any] = {
            "leg": worker.role.value,
            "worker": worker.worker_id,
            "attempt": key[1],
            "room": request.bootstrap.room if request.bootstrap else None,
        }
        for name, value in facts.items():
            if value is not None:
                problem.metadata.setdefault(name, str(value))
        return problem


def _note(course: LegCourse, batch: TokenBatch) -> None:
    if batch.token_ids:
        course.note_tokens(course.clock(), len(batch.token_ids))
    if batch.finish is not None:
        course.finish(batch.finish)
