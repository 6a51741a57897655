"""The engine's loop: computes one step after another, reports the ends of legs, and releases what they held.

Owns the lifecycle of a leg, from `begin` to exactly one end (finish, abort or failure), and the engine's own failure.
The scheduler chooses the next step; `engine` checks the requests.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial

from tandem.domain.generation import EngineFinish, EngineRequest, FinishReason
from tandem.domain.kv_blocks import BlockHashes
from tandem.domain.worker import Capabilities, WorkerRole
from tandem.engine.port import Output
from tandem.engine.simulated.faults import EngineCrashed, FaultInjected, Faults
from tandem.engine.simulated.handover import HandOver
from tandem.engine.simulated.kv_loss import LossyMirror
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase
from tandem.engine.simulated.network import Network
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.scheduler import Scheduler
from tandem.engine.simulated.timing import Clock, Ended, Step, Timing
from tandem.engine.simulated.tokens import NO_STATE, Vocabulary
from tandem.errors import EngineFailed, TandemError


class Machine:
    """One engine: its loop, pool, scheduler, faults and KV transfers."""

    def __init__(
        self,
        role: WorkerRole,
        options: Options,
        capabilities: Capabilities,
        vocabulary: Vocabulary,
        clock: Clock,
        network: Network,
        seed: int,
        kv_check_share: float = 1.0,
    ) -> None:
        self._work = asyncio.Event()
        # As in SGLang, a decode engine has a prefix cache only where an option says so: it receives all its KV.
        caches = options.decode_prefix_cache if role is WorkerRole.DECODE else options.prefix_cache
        page = capabilities.page_size_tokens
        self.kv_mirror: LossyMirror | None = None
        if caches and options.kv_events:
            self.kv_mirror = LossyMirror(
                page, options.kv_event_loss, seed, clock.sleep, lambda: self.pool.cached_names()
            )
        self.pool = KvPool(capabilities.kv_capacity_tokens, page, prefix_cache=caches, mirror=self.kv_mirror)
        self.scheduler = Scheduler(role, self.pool, options, capabilities.running_requests_max)
        self.faults = Faults(
            options.faults,
            seed=seed,
            clock=clock,
            control_file=options.control_file,
            exhaust=self._exhaust,
            restore=self._restore,
        )
        self._timing = Timing(options, seed)
        self._hand_over = HandOver(
            options,
            self.scheduler,
            self.faults,
            self._timing,
            clock,
            network,
            kv_bytes_per_token=capabilities.kv_bytes_per_token,
            kv_check_share=kv_check_share,
            wake=self._wake,
        )
        self._role = role
        self._options = options
        self._capabilities = capabilities
        self._vocabulary = vocabulary
        self._clock = clock
        self._random = random.Random(seed)  # noqa: S311 -- samples of requests without a seed, no secret
        self._moves_kv = capabilities.transfer_backend != "fake"
        self._legs: dict[str, Leg] = {}
        self._leg_tasks: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, host: str, bootstrap_port: int) -> int | None:
        """Start the loop; returns the bootstrap server's port in the prefill role, else None.

        Raises:
            StartError: the bootstrap port cannot be bound.
        """
        port = None
        if self._role is WorkerRole.PREFILL:
            port = await self._hand_over.server.start(host, bootstrap_port)
        for work, name in ((self._loop(), "loop"), (self.faults.watch_control_file(), "control")):
            task = asyncio.create_task(work, name=f"simulated-engine-{name}")
            task.add_done_callback(self._notice_death)
            self._tasks.append(task)
        return port

    async def stop(self) -> None:
        """Abort everything and close the sockets."""
        for leg in list(self._legs.values()):
            self._retire(leg, leg.finish(FinishReason.ABORTED))
        if self.kv_mirror is not None:
            self.kv_mirror.end()
        await self._end_tasks()

    @property
    def legs(self) -> set[Leg]:
        """Every leg that runs or still holds pages."""
        return {*self._legs.values(), *self.scheduler.legs}

    def knows(self, request_id: str) -> bool:
        """Whether a request is running."""
        return request_id in self._legs

    def begin(self, request: EngineRequest, output: Output) -> Leg:
        """Start a request; its tokens and its end go to `output`."""
        if self.failed.done():
            raise EngineFailed(self.failed.result())
        leg = self._make_leg(request, output)
        self._legs[request.request_id] = leg
        meets = self._moves_kv and request.bootstrap is not None
        if self._role is WorkerRole.DECODE:
            leg.recomputed_tokens = 0
            self.scheduler.ask_pages(leg)
        elif not meets:
            self.scheduler.submit(leg)
        if meets:
            work = self._hand_over.receive if self._role is WorkerRole.DECODE else self._hand_over.send
            leg.task = asyncio.create_task(work(leg), name=f"simulated-leg-{request.request_id}")
            self._leg_tasks.add(leg.task)
            leg.task.add_done_callback(partial(self._notice_end, leg))
        elif self._role is not WorkerRole.AGGREGATED:
            # No peer: a canary, or an engine with the `fake` transfer backend.
            leg.kv_transfer_bytes = 0
            leg.state = NO_STATE if self._role is WorkerRole.DECODE else None
            leg.kv_came = True
        self._wake()
        return leg

    def abort(self, request_id: str) -> bool:
        """Abort a request; its pages are released after the current step. Returns whether it was running."""
        leg = self._legs.get(request_id)
        if leg is None:
            return False
        self._retire(leg, leg.finish(FinishReason.ABORTED))
        return True

    # --- The loop

    async def _loop(self) -> None:
        while True:
            self._work.clear()
            for leg in self.scheduler.take_leaving():
                await self._reach("abort", leg)
                self.scheduler.reap(leg)
            ended = Ended()
            step = self.scheduler.plan(ended)
            await self._report_ends(ended)
            if step is not None:
                await self._compute(step)
            elif not self._work.is_set():
                self.scheduler.rest()
                await self._work.wait()

    async def _compute(self, step: Step) -> None:
        for chunk in step.chunks:
            if chunk.first:
                await self._reach("admit", chunk.leg)
                if chunk.leg.prefill_start_time_s is None:
                    chunk.leg.prefill_start_time_s = self._clock.time_s()
            await self._reach("prefill_chunk", chunk.leg)
        for leg in step.decodes:
            await self._reach("decode_step", leg)
        await self._clock.sleep(self._timing.step_s(step))
        for chunk in step.chunks:
            if chunk.last and chunk.leg.prefill_end_time_s is None:
                chunk.leg.prefill_end_time_s = self._clock.time_s()
        ended = Ended()
        self.scheduler.commit(step, ended)
        await self._report_ends(ended)

    async def _report_ends(self, ended: Ended) -> None:
        for leg in ended.naturally:
            if not leg.over:
                await self._reach("finish", leg)
            if not leg.over:
                self._retire(leg, leg.ended())
        for leg in ended.out_of_memory:
            if not leg.over:
                self._retire(leg, EngineFailed("out of KV memory, with every other request retracted"))

    async def _reach(self, point: str, leg: Leg) -> None:
        try:
            await self.faults.reach(point, leg.request.request_id)
        except FaultInjected as fault:
            if not leg.over:
                self._retire(leg, EngineFailed(str(fault)))

    # --- Legs

    def _make_leg(self, request: EngineRequest, output: Output) -> Leg:
        longest = min(self._capabilities.context_tokens_max, self.pool.capacity_tokens)
        budget = min(request.stopping.max_tokens, longest - len(request.token_ids))
        return Leg(
            request=request,
            vocabulary=self._vocabulary,
            token_budget=1 if self._role is WorkerRole.PREFILL else budget,
            page_names=BlockHashes(
                self.pool.page_size_tokens,
                request.cache_salt,
                None if request.adapter is None else request.adapter.engine_id,
            ),
            output=output,
            eos_after_tokens=self._options.eos_after_tokens,
            draw_seed=self._draw_seed(request),
            time_s=self._clock.time_s,
            queued_time_s=self._clock.time_s(),
        )

    def _draw_seed(self, request: EngineRequest) -> int | None:
        """The sampling seed of a request; None: greedy, the default without a temperature and a seed."""
        sampling = request.sampling
        if sampling.temperature == 0 or (sampling.temperature is None and sampling.seed is None):
            return None
        if sampling.seed is not None:
            return sampling.seed
        # The bootstrap room is random and known to both legs, which must sample the same first token.
        return request.bootstrap.room if request.bootstrap is not None else self._random.getrandbits(63)

    def _retire(self, leg: Leg, ending: EngineFinish | TandemError) -> None:
        """Report a leg's end, and have the scheduler remove it."""
        leg.report_end(ending)
        del self._legs[leg.request.request_id]
        if leg.task is not None:
            leg.task.cancel()
        if leg.phase is not Phase.GONE:
            self.scheduler.leave(leg)
            self._wake()

    def _notice_end(self, leg: Leg, task: asyncio.Task[None]) -> None:
        """Callback of a leg's transfer task: fails the leg, or the engine, if the task failed."""
        self._leg_tasks.discard(task)
        if task.cancelled() or (problem := task.exception()) is None:
            return
        if isinstance(problem, EngineCrashed):
            self._die(str(problem))
        elif not leg.over:
            if not isinstance(problem, TandemError):
                problem = EngineFailed(f"internal error in a KV transfer: {problem!r}")
            self._retire(leg, problem)

    # --- The engine

    def _notice_death(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._die(str(problem) or repr(problem))

    def _die(self, sentence: str) -> None:
        """Fail the engine, as when SGLang's scheduler dies: every request fails, every connection is closed."""
        if self.failed.done():
            return
        self.failed.set_result(sentence)
        for leg in list(self._legs.values()):
            self._retire(leg, EngineFailed(sentence))
        self._tasks.append(asyncio.create_task(self._end_tasks(), name="simulated-engine-death"))

    async def _end_tasks(self) -> None:
        ending = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in ending:
            if task.get_name() != "simulated-engine-death":
                task.cancel()
        if self.kv_mirror is not None:
            self.kv_mirror.close()
        await asyncio.gather(*ending, *self._leg_tasks, return_exceptions=True)
        await self._hand_over.server.stop()

    def _wake(self) -> None:
        self._work.set()

    def _exhaust(self, duration_s: float | None) -> None:
        self.pool.withhold()
        if duration_s is not None:
            self._tasks.append(asyncio.create_task(self._restore_after(duration_s), name="simulated-engine-memory"))

    async def _restore_after(self, duration_s: float) -> None:
        await self._clock.sleep(duration_s)
        self._restore()

    def _restore(self) -> None:
        self.pool.restore()
        self._wake()
