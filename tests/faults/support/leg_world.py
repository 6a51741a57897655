"""Workers on virtual time: they take legs, hand over, stream, are killed, stopped, and fail hand-overs.

Each process has the real tables of legs and the real step streams of a worker, around a scripted engine; the
frontend's side of the contract is the real one too. The engine and the network between them follow a script. Tokens
depend on all tokens before them, so one that is lost, repeated or another request's shows in the response. Every chance
is drawn from one seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from tandem_frontend.execution.dispatch import Dispatch, Dispatched
from tandem_frontend.execution.link_leg import Bounds, Leg, Sink
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.routing.candidates import Route

from tandem.api.types.v1 import leg_pb2
from tandem.api.types.v2 import leg_pb2 as leg2_pb2
from tandem.api.worker.v2.step_service_pb2 import StreamStepsResponse
from tandem.domain.generation import Bootstrap, EngineFinish, EngineRequest, FinishReason
from tandem.domain.worker import LEG_CONTRACT, Capabilities, Start, Worker, WorkerRole
from tandem.engine.port import Output
from tandem.errors import LegFailed, ServiceError, TandemError
from tandem.observability.trace_context import Headers
from tandem.service.awake_timers import AwakeTimers
from tandem.worker.leg_messages import engine_request
from tandem.worker.leg_starts import LegStarts
from tandem.worker.legs import Legs
from tandem.worker.steps import StepStreams

PROMPT_TOKEN_S = 0.0001
"""What an aggregated worker takes for a token of a prompt."""
CHECK_S = 0.5
"""How long a question about a worker's health waits."""

CAPABILITIES = Capabilities(
    engine="simulated",
    engine_version="1",
    model="m",
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    context_tokens_max=2048,
    kv_capacity_tokens=4096,
    running_requests_max=16,
    vocabulary_size=1009,
    eos_token_ids=(1,),
    page_size_tokens=16,
    kv_dtype="float32",
    kv_layout="mha:2x2x32",
    kv_bytes_per_token=1024,
    transfer_backend="nixl",
)


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """A greedy model."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append((sum(sequence) * 31 + len(sequence)) % 1009)
    return sequence[len(prompt) :]


def now_s() -> float:
    """Virtual time."""
    return asyncio.get_running_loop().time()


class FixedIdentity:
    """A worker that is never restarted without its process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def current(self) -> Worker:
        return self._worker


class ScriptedWorker:
    """One process of a worker: real legs and step streams, around a scripted engine."""

    def __init__(self, world: World, worker: Worker) -> None:
        self.world = world
        self.worker = worker
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.failures = 0
        """Requests that its engine still fails: in a hand-over, or in a step after the first token."""
        self._runs: dict[str, tuple[asyncio.Task[None], Output]] = {}
        self.legs = Legs(cast("Any", self), cast("Any", FixedIdentity(worker)), timers=world.timers)
        self.streams = StepStreams(self.legs.abort_stream)
        self.starts = LegStarts(self.legs, self.streams, _engine_request)

    async def spend(self, duration_s: float, until: asyncio.Future[None] | None = None) -> None:
        """Let time pass in this process, up to some event; it stands still while it is stopped."""
        over = {self.dead} if until is None else {self.dead, until}
        await asyncio.wait(over, timeout=duration_s, return_when=asyncio.FIRST_COMPLETED)
        await self.thawed.wait()
        if self.dead.done():
            raise ServiceError("connection reset")

    def kill(self) -> None:
        """Its connections break at once."""
        if not self.dead.done():
            self.dead.set_result(None)
        self.thawed.set()
        for task, _ in self._runs.values():
            task.cancel()

    # --- The engine

    async def submit(self, request: EngineRequest, output: Output) -> None:
        """Take a request; it runs in a task."""
        is_prefill = self.worker.role is WorkerRole.PREFILL
        work = self._prefill(request, output) if is_prefill else self._decode(request, output)
        task = asyncio.create_task(self._run(request, output, work), name=f"scripted-{request.request_id}")
        self._runs[request.request_id] = (task, output)

    def abort(self, request_id: str) -> bool:
        """End a request."""
        run = self._runs.pop(request_id, None)
        if run is None:
            return False
        run[0].cancel()
        run[1].finish(EngineFinish(reason=FinishReason.ABORTED))
        return True

    async def _run(self, request: EngineRequest, output: Output, work: Any) -> None:
        try:
            await work
        except TandemError as problem:
            if self._runs.pop(request.request_id, None) is not None and not self.dead.done():
                output.fail(problem)
        else:
            if self._runs.pop(request.request_id, None) is not None:
                output.finish(EngineFinish(reason=FinishReason.LENGTH))

    async def _prefill(self, request: EngineRequest, output: Output) -> None:
        rng, kv = self.world.rng, self.world.kv(_room(request))
        try:
            if self.failures and rng.random() < 0.3:
                self.failures -= 1
                raise LegFailed("no peer came to the room")
            # Sometimes long enough for the worker to have nothing to say but that the leg is alive.
            await self.spend(rng.choice((0.0, 0.0, 0.0, 0.4, 1.2)))
            await self.spend(rng.uniform(0.001, 0.1))
            output.tokens([1], ())
            if self.failures:
                self.failures -= 1
                raise LegFailed("the hand-over failed")
            await self.spend(rng.uniform(0.001, 0.05))
            if not kv.done():
                kv.set_result(None)
            await self.spend(rng.uniform(0.0001, 0.3))
        finally:
            if not kv.done():
                kv.set_exception(LegFailed("the prefill engine has left the room"))
                kv.exception()

    async def _decode(self, request: EngineRequest, output: Output) -> None:
        if self.worker.role is WorkerRole.AGGREGATED:
            await self.spend(len(request.token_ids) * PROMPT_TOKEN_S)
        else:
            kv = self.world.kv(_room(request))
            while not kv.done():
                await self.spend(0.4, kv)
            await kv
        for token in answer(request.token_ids, request.stopping.max_tokens):
            await self.spend(self.world.rng.uniform(0.001, 0.06))
            output.tokens([token], ())
            if self.failures and self.world.rng.random() < 0.5:
                self.failures -= 1
                raise LegFailed("the step failed")


class ScriptedSteps:
    """A step stream's call over the simulated network: what the worker sends comes as long as it runs."""

    def __init__(self, scripted: ScriptedWorker, frontend_id: str) -> None:
        self._worker = scripted
        self._stream = scripted.streams.open(frontend_id, on_overflow=self.cancel)
        self._messages = self._stream.messages()
        self._is_cancelled = False

    async def read(self) -> StreamStepsResponse:
        """The next message."""
        scripted = self._worker
        if scripted.dead.done():
            raise ServiceError("connection refused")
        next_message = asyncio.ensure_future(anext(self._messages))
        try:
            waiting: set[asyncio.Future[Any]] = {next_message, scripted.dead}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            await scripted.thawed.wait()
            if scripted.dead.done():
                raise ServiceError("connection reset")
            return next_message.result()
        finally:
            if not next_message.done():
                next_message.cancel()
                await asyncio.wait({next_message})

    def cancel(self) -> None:
        """The frontend's end of it, which the worker hears of when it runs."""
        if not self._is_cancelled:
            self._is_cancelled = True
            self._worker.streams.close(self._stream)


@dataclass(slots=True)
class Sent:
    """One attempt, as it was dispatched."""

    request_id: str
    time_s: float
    route: Route
    leg: leg_pb2.LegRequest
    legs: tuple[Leg, Leg] | tuple[Leg, None]
    """Of the decode (or aggregated) worker, and of the prefill worker."""


@dataclass
class World:
    """A fleet; stands for the network, the view of the registry and the health of workers."""

    rng: random.Random
    workers: tuple[Worker, ...]
    bounds: Bounds = field(default_factory=lambda: Bounds(accept_s=2.0, silence_s=2.0))
    sent: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.timers = AwakeTimers()
        self._kv: dict[int, asyncio.Future[None]] = {}
        self.scripted: dict[Start, ScriptedWorker] = {
            worker.start: ScriptedWorker(self, worker) for worker in self.workers
        }
        self.links = WorkerLinks("frontend-0", cast("Any", self), self.bounds, self.timers, self.answers)
        self.links.follow(self.workers)
        self._dispatch = Dispatch(self.links, self.rng)

    async def close(self) -> None:
        """The end of the history."""
        await self.links.close()
        self.timers.close()

    def view(self) -> tuple[Worker, ...]:
        """What the registry lists: it does not know who is dead."""
        return self.workers

    def unhealthy(self) -> list[Start]:
        """Whose stream of health has ended."""
        return [start for start, scripted in self.scripted.items() if scripted.dead.done()]

    async def answers(self, worker: Worker) -> bool:
        """Whether it answers a question about its health."""
        scripted = self.scripted[worker.start]
        if scripted.thawed.is_set():
            return not scripted.dead.done()
        await asyncio.sleep(CHECK_S)
        return False

    def restart(self, worker: Worker) -> Worker:
        """A newer start of a worker that is dead."""
        newer = replace(worker, epoch=worker.epoch + 1)
        self.workers = tuple(newer if each.start == worker.start else each for each in self.workers)
        self.scripted[newer.start] = ScriptedWorker(self, newer)
        self.links.follow(self.workers)
        return newer

    def kv(self, room: int) -> asyncio.Future[None]:
        """The hand-over in a bootstrap room."""
        return self._kv.setdefault(room, asyncio.get_running_loop().create_future())

    def open_legs(self) -> int:
        """Legs that processes that live still have."""
        return sum(scripted.legs.open_count for scripted in self.scripted.values() if not scripted.dead.done())

    def send(
        self,
        route: Route,
        leg: leg_pb2.LegRequest,
        attempt: int,
        sinks: tuple[Sink, Sink | None],
        timeout_s: float | None,
        headers: Headers = (),
    ) -> Dispatched:
        """Start the legs of an attempt, and keep what was sent."""
        dispatched = self._dispatch.send(route, leg, attempt, sinks, timeout_s, headers)
        legs = cast("tuple[Leg, Leg] | tuple[Leg, None]", (dispatched.decode, dispatched.prefill))
        self.sent.append(Sent(leg.request_id, now_s(), route, leg, legs))
        return dispatched

    # --- The network: stands for `rpc.step_calls.WorkerCalls`

    def connection(self, worker: Worker) -> object:
        """One for each process."""
        return self.scripted[worker.start]

    def open_steps(self, worker: Worker, frontend_id: str) -> ScriptedSteps:
        """Open a step stream."""
        return ScriptedSteps(self.scripted[worker.start], frontend_id)

    async def start_legs(
        self, worker: Worker, stream_id: int, legs: Sequence[leg2_pb2.LegStart]
    ) -> Sequence[leg2_pb2.LegStartResult]:
        """Start legs: as a rule they are taken at once, or late, so that the other leg may have come far by then."""
        delay_s = self.rng.uniform(0.0005, 0.004) if self.rng.random() < 0.8 else self.rng.uniform(0, 0.3)
        return cast(
            "Sequence[leg2_pb2.LegStartResult]",
            await self._call(worker, delay_s, lambda scripted: scripted.starts.start(stream_id, legs)),
        )

    async def abort_legs(self, worker: Worker, stream_id: int, legs: Iterable[int]) -> None:
        """Abort legs."""

        async def abort(scripted: ScriptedWorker) -> int:
            return scripted.legs.abort_numbered(stream_id, legs)

        await self._call(worker, self.rng.uniform(0.0005, 0.004), abort)

    async def _call(self, worker: Worker, delay_s: float, handle: Callable[[ScriptedWorker], Any]) -> object:
        """A call that goes on in the worker's process whatever becomes of its caller; the answer may come late."""
        scripted = self.scripted[worker.start]

        async def handled() -> object:
            await scripted.spend(delay_s)
            result = await handle(scripted)
            # The answer is a message of its own: tokens and ends of the legs may overtake it.
            await scripted.spend(self.rng.uniform(0, 0.002) if self.rng.random() < 0.8 else self.rng.uniform(0, 0.5))
            return result

        task = asyncio.create_task(handled())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)


def _engine_request(leg: leg_pb2.LegRequest) -> EngineRequest:
    return engine_request(leg, Bootstrap(host=leg.bootstrap.host, port=leg.bootstrap.port, room=leg.bootstrap.room))


def _room(request: EngineRequest) -> int:
    assert request.bootstrap is not None
    return request.bootstrap.room


def fleet(prefills: int, decodes: int, capabilities: Any, aggregated: int = 0) -> tuple[Worker, ...]:
    """Workers that fit together."""
    alone = replace(capabilities, transfer_backend="none")
    return (
        *(_worker(f"aggregated-{n}", WorkerRole.AGGREGATED, n, alone) for n in range(aggregated)),
        *(_worker(f"prefill-{n}", WorkerRole.PREFILL, n, capabilities) for n in range(prefills)),
        *(_worker(f"decode-{n}", WorkerRole.DECODE, n, capabilities) for n in range(decodes)),
    )


PORTS = {WorkerRole.DECODE: 2_000, WorkerRole.PREFILL: 2_100, WorkerRole.AGGREGATED: 2_200}


def _worker(worker_id: str, role: WorkerRole, number: int, capabilities: Any) -> Worker:
    is_prefill = role is WorkerRole.PREFILL
    return Worker(
        worker_id=worker_id,
        epoch=7,
        role=role,
        address=f"127.0.0.1:{PORTS[role] + number}",
        capabilities=capabilities,
        leg_contract=LEG_CONTRACT,
        bootstrap_host="127.0.0.1" if is_prefill else None,
        bootstrap_port=9_000 + number if is_prefill else None,
    )
