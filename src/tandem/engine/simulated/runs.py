"""What a leg does in each role, step by step, with the KV memory, the compute and the rendezvous it needs.

Every step may be cancelled; leaving a block gives back what it took. Endings and errors are the adapter's business.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from tandem.engine.simulated.admission import Admission
from tandem.engine.simulated.kv_events import KvEventLog
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.rendezvous import BootstrapServer, DecodePeer, KvPuller, leg_failed
from tandem.engine.simulated.timing import Clock, Timing
from tandem.engine.simulated.tokens import NO_STATE, SequenceState, Vocabulary, digest
from tandem.engine.simulated.wire import KvHeader
from tandem.errors import EngineFailed
from tandem.model.generation import EngineFinish, EngineRequest
from tandem.model.worker import Capabilities, WorkerRole


class Machine:
    """Everything one engine computes with."""

    def __init__(
        self,
        role: WorkerRole,
        options: Options,
        capabilities: Capabilities,
        vocabulary: Vocabulary,
        clock: Clock,
        seed: int,
    ) -> None:
        # As in SGLang, a decode engine has no prefix cache: its KV comes from elsewhere.
        caches = options.prefix_cache and role is not WorkerRole.DECODE
        page = capabilities.page_size_tokens
        self.kv_event_log = KvEventLog(page) if caches and options.kv_events else None
        self.pool = KvPool(capabilities.kv_capacity_tokens, page, prefix_cache=caches, log=self.kv_event_log)
        self.admission = Admission(self.pool, capabilities.running_requests_max)
        self.server = BootstrapServer(options.bootstrap_timeout_s, options.transfer_timeout_s)
        self._puller = KvPuller(options.bootstrap_timeout_s, options.transfer_timeout_s, clock.time_s)
        self._role = role
        self._options = options
        self._capabilities = capabilities
        self._vocabulary = vocabulary
        self._clock = clock
        self._timing = Timing(options, seed)
        self._random = random.Random(seed)  # noqa: S311 -- draws nobody asked to repeat, no secret
        self._moves_kv = capabilities.transfer_backend != "fake"
        # Held while a prompt is computed: the next prompt waits for it, and so do an aggregated engine's decode steps.
        self._compute = asyncio.Lock()

    def new_leg(self, request: EngineRequest) -> Leg:
        """A leg that has just been asked for."""
        longest = min(self._capabilities.context_tokens_max, self.pool.capacity_tokens)
        budget = min(request.stopping.max_tokens, longest - len(request.token_ids))
        return Leg(
            request=request,
            vocabulary=self._vocabulary,
            token_budget=1 if self._role is WorkerRole.PREFILL else budget,
            eos_after_tokens=self._options.eos_after_tokens,
            draw_seed=self._draw_seed(request),
            queued_time_s=self._clock.time_s(),
        )

    def _draw_seed(self, request: EngineRequest) -> int | None:
        """The seed of a request that draws; this engine's model is greedy unless a temperature or a seed says else."""
        sampling = request.sampling
        if sampling.temperature == 0 or (sampling.temperature is None and sampling.seed is None):
            return None
        if sampling.seed is not None:
            return sampling.seed
        # The room is random and known to both legs, which must draw the same first token.
        return request.bootstrap.room if request.bootstrap is not None else self._random.getrandbits(63)

    async def run(self, leg: Leg) -> EngineFinish:
        """Do one leg from the queue to its last token."""
        if self._role is WorkerRole.AGGREGATED:
            return await self._run_aggregated(leg)
        if self._role is WorkerRole.DECODE:
            return await self._run_decode(leg)
        if not self._moves_kv:
            leg.kv_transfer_bytes = 0
            async with self._kv(leg):
                await self._compute_prompt(leg)
                return leg.ended()
        return await self._run_prefill(leg)

    async def run_canary(self, leg: Leg) -> None:
        """Compute a prompt without a peer, whatever the role."""
        self._maybe_break(leg, "canary")
        async with self._kv(leg):
            await self._compute_prompt(leg)

    async def _run_aggregated(self, leg: Leg) -> EngineFinish:
        async with self._kv(leg):
            await self._prefill(leg)
            return await self._decode(leg, digest(leg.request.token_ids))

    async def _run_prefill(self, leg: Leg) -> EngineFinish:
        bootstrap = leg.request.bootstrap
        assert bootstrap is not None
        self._maybe_break(leg, "bootstrap")
        leg.transferring = True
        # The order is SGLang's: first meet, so that decode has memory for the KV, then compute.
        async with self.server.meet(bootstrap.room) as peer:
            await peer.unless_lost(self._compute_and_hand_over(leg, peer, bootstrap.room))
        leg.transferring = False
        return leg.ended()

    async def _compute_and_hand_over(self, leg: Leg, peer: DecodePeer, room: int) -> None:
        async with self._kv(leg):
            await self._compute_prompt(leg)
            self._maybe_break(leg, "transfer")
            tokens = len(leg.request.token_ids)
            pages_tokens = self.pool.pages_for(tokens) * self.pool.page_size_tokens
            header = KvHeader(tokens, pages_tokens * self._capabilities.kv_bytes_per_token)
            move = partial(self._clock.sleep, self._timing.transfer_s(header.size_bytes))
            leg.kv_transfer_start_time_s = self._clock.time_s()
            await self.server.hand_over(peer, room, header, digest(leg.request.token_ids), move)
            leg.kv_transfer_end_time_s = self._clock.time_s()
            leg.kv_transfer_bytes = header.size_bytes

    async def _run_decode(self, leg: Leg) -> EngineFinish:
        leg.recomputed_tokens = 0
        async with self._kv(leg):
            return await self._decode(leg, await self._receive(leg))

    async def _receive(self, leg: Leg) -> SequenceState:
        bootstrap = leg.request.bootstrap
        assert bootstrap is not None
        if not self._moves_kv:
            leg.kv_transfer_bytes = 0
            return NO_STATE
        self._maybe_break(leg, "bootstrap")
        leg.transferring = True
        received = await self._puller.pull(bootstrap, len(leg.request.token_ids))
        leg.transferring = False
        self._maybe_break(leg, "transfer")
        leg.kv_transfer_start_time_s = received.begin_time_s
        leg.kv_transfer_end_time_s = received.end_time_s
        leg.kv_transfer_bytes = received.size_bytes
        return received.state

    @asynccontextmanager
    async def _kv(self, leg: Leg) -> AsyncIterator[None]:
        """Wait for memory for the whole life of the leg, and give it back at its end."""
        prompt = leg.request.token_ids
        salt = leg.request.cache_salt
        lease = await self.admission.admit(prompt, len(prompt) + leg.token_budget, salt)
        leg.admitted = True
        leg.cached_tokens = lease.cached_tokens
        try:
            yield
        finally:
            leg.admitted = False
            # A prompt that was not computed to its end has no KV worth keeping.
            self.admission.release(lease, leg.sequence() if leg.prefill_end_time_s is not None else ())

    async def _compute_prompt(self, leg: Leg) -> None:
        await self._prefill(leg)
        leg.emit_next(digest(leg.request.token_ids))

    async def _prefill(self, leg: Leg) -> None:
        async with self._compute:
            leg.prefill_start_time_s = self._clock.time_s()
            await self._clock.sleep(self._timing.prefill_s(len(leg.request.token_ids) - leg.cached_tokens))
            leg.prefill_end_time_s = self._clock.time_s()

    async def _decode(self, leg: Leg, state: SequenceState) -> EngineFinish:
        state = leg.emit_next(state)
        while (end := leg.end()) is None:
            if self._options.fail_at == "decode":
                raise EngineFailed("the simulated engine fails at decode, as its options say")
            async with self._compute:
                pass  # a prompt in the making delays this step
            await self._clock.sleep(self._timing.decode_step_s())
            state = leg.emit_next(state)
        return end

    def _maybe_break(self, leg: Leg, phase: str) -> None:
        if self._options.fail_at == phase:
            if phase == "canary":
                raise EngineFailed("the simulated engine fails at its canary, as its options say")
            bootstrap = leg.request.bootstrap
            assert bootstrap is not None
            raise leg_failed(self._role.value, phase, bootstrap.room, "the simulated engine fails here by its options")
