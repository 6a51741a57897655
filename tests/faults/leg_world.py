"""Workers that are played on virtual time: they take legs, hand over, stream, are killed, stopped, and fail hand-overs.

Owns what a frontend can see of a fleet and nothing of the frontend. Tokens depend on all tokens before them, so one
that is lost, repeated or another request's shows in the answer. Every chance is drawn from one seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from tandem_frontend.dispatch import Dispatched
from tandem_frontend.routing.candidates import Route

from tandem.api.decode.v1.decode_service_pb2 import DecodeResponse
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import DeadlinePassed, LegFailed, ServiceError, TandemError
from tandem.model.worker import LEG_CONTRACT, Capabilities, Start, Worker, WorkerRole
from tandem.observe.trace_context import Headers

SILENCE_S = 0.4
"""After so long a worker says that it still works on a leg."""
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


class Played:
    """One process of a worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.handover_failures = 0
        """Hand-overs that still fail."""

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


class Call:
    """A leg's call, from the frontend's side; its worker plays the other one. Reads like LegCall."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.play: asyncio.Task[None] | None = None
        self.is_cancelled = False

    @property
    def is_open(self) -> bool:
        """Whether its worker still has it."""
        return self.play is not None and not self.play.done()

    def say(self, **event: Any) -> None:
        """An event of the leg."""
        self._events.put_nowait(DecodeResponse(**event))

    def fail(self, problem: TandemError) -> None:
        """The end of the leg."""
        self._events.put_nowait(problem)

    async def read(self) -> Any:
        """The next event."""
        event = None if self.is_cancelled else await self._events.get()
        if event is None:
            raise asyncio.CancelledError
        if isinstance(event, TandemError):
            raise event
        return event

    def cancel(self) -> None:
        """The frontend's end of it."""
        self.is_cancelled = True
        self._events.put_nowait(None)
        if self.play is not None:
            self.play.cancel()


@dataclass(slots=True)
class Sent:
    """One attempt, as it was dispatched."""

    request_id: str
    time_s: float
    route: Route
    leg: leg_pb2.LegRequest
    calls: tuple[Call, Call]


@dataclass
class World:
    """A fleet; stands for `Dispatch`, the view of the registry and the health of workers."""

    rng: random.Random
    workers: tuple[Worker, ...]
    sent: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.played: dict[Start, Played] = {worker.start: Played(worker) for worker in self.workers}

    def view(self) -> tuple[Worker, ...]:
        """What the registry tells: it does not know who is dead."""
        return self.workers

    def unhealthy(self) -> list[Start]:
        """Whose stream of health has ended."""
        return [start for start, played in self.played.items() if played.dead.done()]

    async def answers(self, worker: Worker) -> bool:
        """Whether it answers a question about its health."""
        played = self.played[worker.start]
        if played.thawed.is_set():
            return not played.dead.done()
        await asyncio.sleep(CHECK_S)
        return False

    def restart(self, worker: Worker) -> Worker:
        """A newer start of a worker that is dead."""
        newer = replace(worker, epoch=worker.epoch + 1)
        self.workers = tuple(newer if each.start == worker.start else each for each in self.workers)
        self.played[newer.start] = Played(newer)
        return newer

    def send(
        self, route: Route, leg: leg_pb2.LegRequest, attempt: int, timeout_s: float | None, headers: Headers = ()
    ) -> Dispatched:
        """Take an attempt."""
        assert route.prefill is not None
        decode, prefill = Call(), Call()
        kv: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        deadline_s = None if timeout_s is None else now_s() + timeout_s
        decode.play = asyncio.create_task(self._play(decode, self._decode(decode, route.decode, leg, kv), deadline_s))
        prefill.play = asyncio.create_task(self._play(prefill, self._prefill(prefill, route.prefill, kv), deadline_s))
        self.sent.append(Sent(leg.request_id, now_s(), route, leg, (decode, prefill)))
        return Dispatched(route, attempt, len(self.sent), cast("Any", decode), cast("Any", prefill))

    async def _play(self, call: Call, legs_work: Any, deadline_s: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline_s):
                await legs_work
        except TandemError as problem:
            call.fail(problem)
        except TimeoutError:
            call.fail(DeadlinePassed("the deadline has passed"))

    async def _accept(self, call: Call, played: Played) -> None:
        """Take a leg: at once, or late, so that the other leg may have come far by then."""
        await played.spend(self.rng.uniform(0.0005, 0.004) if self.rng.random() < 0.8 else self.rng.uniform(0, 0.3))
        call.say(accepted=leg_pb2.LegAccepted(worker_id=played.worker.worker_id, epoch=played.worker.epoch))

    async def _prefill(self, call: Call, worker: Worker, kv: asyncio.Future[None]) -> None:
        played = self.played[worker.start]
        try:
            await self._accept(call, played)
            if played.handover_failures and self.rng.random() < 0.3:
                played.handover_failures -= 1
                raise LegFailed("nobody came to the room")
            for _ in range(self.rng.choice((0, 0, 0, 1, 3))):
                await played.spend(SILENCE_S)
                call.say(progress=leg_pb2.LegProgress())
            await played.spend(self.rng.uniform(0.001, 0.1))
            call.say(tokens=leg_pb2.LegTokens(index=0, token_ids=[1]))
            if played.handover_failures:
                played.handover_failures -= 1
                raise LegFailed("the hand-over failed")
            await played.spend(self.rng.uniform(0.001, 0.05))
            if not kv.done():
                kv.set_result(None)
            await played.spend(self.rng.uniform(0.0001, 0.3))
            call.say(finish=leg_pb2.LegFinish())
        finally:
            if not kv.done():
                kv.set_exception(LegFailed("the prefill engine has left the room"))
                kv.exception()

    async def _decode(self, call: Call, worker: Worker, leg: leg_pb2.LegRequest, kv: asyncio.Future[None]) -> None:
        played = self.played[worker.start]
        await self._accept(call, played)
        while not kv.done():
            await played.spend(SILENCE_S, kv)
            if not kv.done():
                call.say(progress=leg_pb2.LegProgress())
        await kv
        for index, token in enumerate(answer(leg.token_ids, leg.stopping.max_tokens)):
            await played.spend(self.rng.uniform(0.001, 0.06))
            call.say(tokens=leg_pb2.LegTokens(index=index, token_ids=[token]))
        call.say(finish=leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH))


def fleet(prefills: int, decodes: int, capabilities: Any) -> tuple[Worker, ...]:
    """Workers that fit together."""
    return (
        *(_worker(f"prefill-{n}", WorkerRole.PREFILL, n, capabilities) for n in range(prefills)),
        *(_worker(f"decode-{n}", WorkerRole.DECODE, n, capabilities) for n in range(decodes)),
    )


def _worker(worker_id: str, role: WorkerRole, number: int, capabilities: Any) -> Worker:
    is_prefill = role is WorkerRole.PREFILL
    return Worker(
        worker_id=worker_id,
        epoch=7,
        role=role,
        address=f"127.0.0.1:{2_000 + number + 100 * is_prefill}",
        capabilities=capabilities,
        bootstrap_host="127.0.0.1" if is_prefill else None,
        bootstrap_port=9_000 + number if is_prefill else None,
        leg_contract=LEG_CONTRACT,
    )
