"""KV transfer of a leg, in a task beside the engine's loop: bootstrap with the peer, then the transfer itself.

Every step may be cancelled. The scheduler owns memory and computation; a failed transfer is a LegFailed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable

from tandem.domain.generation import Bootstrap, KvCheck
from tandem.domain.kv_sample import is_sampled
from tandem.engine.simulated.faults import FaultInjected, Faults
from tandem.engine.simulated.kv_content import KvContent
from tandem.engine.simulated.leg import Leg
from tandem.engine.simulated.network import Network
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.rendezvous import BootstrapServer, DecodePeer, KvPuller, ReceivedKv, leg_failed
from tandem.engine.simulated.scheduler import Scheduler
from tandem.engine.simulated.timing import Clock, Timing
from tandem.engine.simulated.tokens import SequenceState, digest
from tandem.engine.simulated.wire import KvHeader
from tandem.errors import KvCorrupt


class HandOver:
    """Both sides of KV transfers; an engine uses the one of its role."""

    def __init__(
        self,
        options: Options,
        scheduler: Scheduler,
        faults: Faults,
        timing: Timing,
        clock: Clock,
        network: Network,
        *,
        kv_bytes_per_token: int,
        kv_check_share: float,
        wake: Callable[[], None],
    ) -> None:
        """`wake` makes the engine's loop look for legs that can proceed."""
        self._kv_check_share = kv_check_share
        self._draw = random.Random(0)  # noqa: S311 -- chooses what a fault damages
        meet_s, transfer_s = options.bootstrap_timeout_s, options.transfer_timeout_s
        self.server = BootstrapServer(meet_s, transfer_s, network)
        # Decode has its memory when it connects, so prefill's leg is there or lost.
        self._puller = KvPuller(min(meet_s, transfer_s), transfer_s, clock.time_s, network)
        self._scheduler = scheduler
        self._faults = faults
        self._timing = timing
        self._clock = clock
        self._page_bytes = options.page_size_tokens * kv_bytes_per_token
        self._page_size_tokens = options.page_size_tokens
        self._wake = wake
        # Models the bandwidth of one prefill engine: the parts of all its transfers are sent one after another.
        self._link = asyncio.Lock()

    async def send(self, leg: Leg) -> None:
        """Prefill leg: wait for decode, have the prompt computed, send the KV of each chunk once it is computed."""
        bootstrap = _room(leg)
        await self._reach(leg, "prefill", "bootstrap")
        # As in SGLang, bootstrap comes first and computation second, so that decode has memory when KV is ready.
        async with self.server.meet(bootstrap.room) as peer:
            leg.bootstrap_end_time_s = self._clock.time_s()
            self._scheduler.submit(leg)
            self._wake()
            await peer.unless_lost(self._send_to(leg, peer, bootstrap.room))
        leg.kv_went = True
        self._wake()

    async def receive(self, leg: Leg) -> None:
        """Decode leg: wait for memory, connect to prefill, and receive the KV."""
        bootstrap = _room(leg)
        await leg.pages_granted.wait()
        leg.preallocation_end_time_s = self._clock.time_s()
        await self._reach(leg, "decode", "bootstrap")
        received = await self._puller.pull(
            bootstrap, leg.prompt_tokens, leg.cached_tokens, lambda point: self._reach(leg, "decode", point)
        )
        leg.kv_transfer_start_time_s = received.begin_time_s
        leg.kv_transfer_end_time_s = received.end_time_s
        leg.kv_transfer_bytes = received.size_bytes
        leg.state = await self._check(leg, bootstrap.room, received)
        leg.kv_came = True
        self._wake()

    async def _check(self, leg: Leg, room: int, received: ReceivedKv) -> SequenceState:
        """Compare the KV with what was sent, as decode does before it computes anything from it.

        Returns:
            The state that the KV stands for.

        Raises:
            KvCorrupt: it is not what was sent.
        """
        content = self._content(leg, received.state, leg.cached_tokens)
        for kind in await self._reach(leg, "decode", "kv_arrived"):
            content.damage(kind, self._page_size_tokens, self._draw)
        leg.kv_check = KvCheck.UNCHECKED
        if received.kv_digest is not None and is_sampled(room, self._kv_check_share):
            if content.digest() != received.kv_digest:
                problem = "the KV that arrived is not what the prefill engine sent"
                raise KvCorrupt(problem, leg="decode", phase="transferring", room=room)
            leg.kv_check = KvCheck.MATCHED
        return content.spoiled()

    def _content(self, leg: Leg, state: SequenceState, cached_tokens: int) -> KvContent:
        """The KV that moves: what is not in decode's prefix cache, in full pages."""
        held_tokens = cached_tokens // self._page_size_tokens * self._page_size_tokens
        return KvContent(state, max(0, leg.prompt_tokens - held_tokens))

    async def _send_to(self, leg: Leg, peer: DecodePeer, room: int) -> None:
        computed_tokens = await leg.computed_parts.get()
        await self._reach(leg, "prefill", "transfer_begin")
        leg.kv_transfer_start_time_s = self._clock.time_s()
        held_pages = min(peer.cached_tokens // self._page_size_tokens, self._pages(leg.prompt_tokens))
        header = KvHeader(leg.prompt_tokens, (self._pages(leg.prompt_tokens) - held_pages) * self._page_bytes)
        moving = self._move(leg, computed_tokens, held_pages, header.size_bytes)
        state, kv_digest = digest(leg.request.token_ids, leg.request.adapter), None
        if is_sampled(room, self._kv_check_share):
            kv_digest = self._content(leg, state, peer.cached_tokens).digest()
        await self.server.hand_over(peer, room, header, state, moving, kv_digest)
        leg.kv_transfer_end_time_s = self._clock.time_s()
        leg.kv_transfer_bytes = header.size_bytes

    async def _move(self, leg: Leg, computed_tokens: int, held_pages: int, size_bytes: int) -> AsyncGenerator[int]:
        """Send the KV as it is computed, chunk by chunk: full pages only, until the prompt is complete.

        The first `held_pages` are in decode's prefix cache and are not sent.
        """
        moved_bytes, half_bytes = 0, -(-size_bytes // 2)
        while True:
            whole = computed_tokens == leg.prompt_tokens
            pages = self._pages(computed_tokens) if whole else computed_tokens // self._page_size_tokens
            part_bytes = (pages - held_pages) * self._page_bytes - moved_bytes
            if part_bytes > 0:
                first_bytes = half_bytes - moved_bytes
                if 0 < first_bytes <= part_bytes:
                    await self._move_part(first_bytes)
                    await self._reach(leg, "prefill", "transfer_middle")
                    if part_bytes > first_bytes:
                        await self._move_part(part_bytes - first_bytes, begun=True)
                else:
                    await self._move_part(part_bytes)
                moved_bytes += part_bytes
                if whole:
                    await self._reach(leg, "prefill", "transfer_end")
                yield part_bytes
            if whole:
                return
            computed_tokens = await leg.computed_parts.get()

    async def _move_part(self, size_bytes: int, *, begun: bool = False) -> None:
        async with self._link:
            await self._clock.sleep(self._timing.transfer_s(size_bytes, begun=begun))

    async def _reach(self, leg: Leg, role: str, point: str) -> tuple[str, ...]:
        try:
            return await self._faults.reach(point, leg.request.request_id)
        except FaultInjected as fault:
            phase = "bootstrapping" if point == "bootstrap" else "transferring"
            raise leg_failed(role, phase, _room(leg).room, str(fault)) from None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size_tokens)


def _room(leg: Leg) -> Bootstrap:
    assert leg.request.bootstrap is not None
    return leg.request.bootstrap
