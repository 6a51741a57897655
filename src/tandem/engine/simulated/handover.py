"""KV transfer of a leg, in a task beside the engine's loop: bootstrap with the peer, then the transfer itself.

Every step may be cancelled. The scheduler owns memory and computation; a failed transfer is a LegFailed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tandem.domain.generation import Bootstrap
from tandem.engine.simulated.faults import FaultInjected, Faults
from tandem.engine.simulated.leg import Leg
from tandem.engine.simulated.network import Network
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.rendezvous import BootstrapServer, DecodePeer, KvPuller, leg_failed
from tandem.engine.simulated.scheduler import Scheduler
from tandem.engine.simulated.timing import Clock, Timing
from tandem.engine.simulated.tokens import digest
from tandem.engine.simulated.wire import KvHeader


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
        wake: Callable[[], None],
    ) -> None:
        """`wake` makes the engine's loop look for legs that can proceed."""
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
        leg.state = received.state
        leg.kv_came = True
        self._wake()

    async def _send_to(self, leg: Leg, peer: DecodePeer, room: int) -> None:
        computed_tokens = await leg.computed_parts.get()
        await self._reach(leg, "prefill", "transfer_begin")
        leg.kv_transfer_start_time_s = self._clock.time_s()
        held_pages = min(peer.cached_tokens // self._page_size_tokens, self._pages(leg.prompt_tokens))
        header = KvHeader(leg.prompt_tokens, (self._pages(leg.prompt_tokens) - held_pages) * self._page_bytes)
        moving = self._move(leg, computed_tokens, held_pages, header.size_bytes)
        await self.server.hand_over(peer, room, header, digest(leg.request.token_ids, leg.request.adapter), moving)
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

    async def _reach(self, leg: Leg, role: str, point: str) -> None:
        try:
            await self._faults.reach(point, leg.request.request_id)
        except FaultInjected as fault:
            phase = "bootstrapping" if point == "bootstrap" else "transferring"
            raise leg_failed(role, phase, _room(leg).room, str(fault)) from None

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size_tokens)


def _room(leg: Leg) -> Bootstrap:
    assert leg.request.bootstrap is not None
    return leg.request.bootstrap
