"""Watches one Consul service by blocking queries: delivers a snapshot for each index, with the id of its generation.

Owns the blocking queries, what an index that goes backwards means, and the second read after a response that is
suddenly empty. Decides nothing about members.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from tandem.clock import Clock
from tandem.errors import ServiceError
from tandem.rpc.backoff import Backoff
from tandem_registry.backends.consul.client import ConsulClient, Generation, HealthResponse
from tandem_registry.backends.consul.parsing import ResponseReader
from tandem_registry.backends.consul.records import Replica
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, observed_of

log = logging.getLogger(__name__)

WAIT_S = 5.0
"""Longest blocking query. An unresponsive Consul is noticed after this plus the response timeout."""
GAP_MIN_S = 0.02
"""Changes within this time are merged into one snapshot."""
GAP_FACTOR = 3
"""Pause after a response, as a multiple of its processing time: a burst of changes uses at most a quarter of a core."""
SUSPECT_PAUSE_S = 0.3
"""Before a suddenly empty response is read again."""


class BlockingQuery:
    """The blocking-query loop; `run` is one task."""

    def __init__(
        self,
        client: ConsulClient,
        *,
        new_id: Callable[[], str],
        on_observed: Callable[[str, ConsulSnapshot], None],
        on_lost: Callable[[ServiceError], None],
        explains: Callable[[ConsulSnapshot], bool],
        clock: Clock,
        rng: random.Random | None = None,
    ) -> None:
        """`on_observed` gets the registry id and the snapshot at each new index; `on_lost` the reason why Consul is
        unreachable.

        `explains` returns whether this replica has removed all members of a snapshot, so that an empty one is expected.
        """
        self._client = client
        self._new_id = new_id
        self._on_observed = on_observed
        self._on_lost = on_lost
        self._explains = explains
        self._clock = clock
        self._backoff = Backoff(rng=rng)
        self._reader = ResponseReader()
        self._registry_id = ""
        self._observed = ConsulSnapshot()
        self._arrived = asyncio.Event()
        self._refresh = asyncio.Lock()
        self._refresh_count = 0
        self.responded_s = clock()
        """Time of Consul's last response; before the first one, of the construction."""

    async def run(self) -> None:
        """Watch for ever, with backoff after failures."""
        while True:
            try:
                await self._watch()
            except ServiceError as problem:
                self._on_lost(problem)
                await asyncio.sleep(self._backoff.next_s())

    async def wait_for(self, accept: Callable[[], bool]) -> None:
        """Return once `accept()` is true; checked after each snapshot. Bound it with asyncio.timeout."""
        while not accept():
            await self._arrived.wait()

    async def catch_up(self) -> None:
        """Return once everything that Consul had at the time of the call has been delivered.

        Raises:
            ServiceError: Consul is unreachable.
        """
        wanted = self._refresh_count + 1
        async with self._refresh:
            # Calls that queued here meanwhile share the one index read that began after all of them arrived.
            if self._refresh_count >= wanted:
                return
            self._refresh_count += 1
            index = await self._client.index()
            await self.wait_for(lambda: self._observed.index >= index)

    async def _watch(self) -> None:
        """Deliver snapshots until the generation may have changed."""
        observed, read_s = self._read(await self._begin())
        while True:
            worked_s = read_s + self._deliver(observed)
            self._backoff.reset()
            await asyncio.sleep(max(GAP_MIN_S, GAP_FACTOR * worked_s))
            response = await self._client.health(HealthResponse(observed.index, None), WAIT_S)
            self.responded_s = self._clock()
            if response.index < observed.index:
                return
            if response.body is None:
                if await self._is_another_generation():
                    return
                read_s = 0.0
                continue
            observed, read_s = self._read(response)
            if self._is_suspect(observed):
                count = _count(self._observed)
                log.warning(
                    "Consul lists no members at index %d, and listed %d before: reading again before any is removed",
                    observed.index, count,
                )  # fmt: skip
                await asyncio.sleep(SUSPECT_PAUSE_S)
                return

    async def _begin(self) -> HealthResponse:
        """The first response, of a new generation or of the current one."""
        while True:
            before = await self._client.generation()
            response = await self._client.health(is_consistent=True)
            self.responded_s = self._clock()
            is_known = before is not None and before.registry_id == self._registry_id
            if before is None or (is_known and response.index < self._observed.index):
                await self._begin_generation(before, response)
                continue
            after = await self._client.generation()
            if after != before:
                continue
            if not is_known:
                self._registry_id, self._observed = before.registry_id, ConsulSnapshot()
            return response

    async def _begin_generation(self, before: Generation | None, response: HealthResponse) -> None:
        """Consul's data is new, or was restored from an older state: its indexes must not continue old revisions."""
        if await self._client.begin_generation(self._new_id(), before):
            log.warning(
                "Consul has lost data: index %d (was %d); started a new generation",
                response.index,
                self._observed.index,
            )

    async def _is_another_generation(self) -> bool:
        now = await self._client.generation()
        return now is None or now.registry_id != self._registry_id

    def _is_suspect(self, observed: ConsulSnapshot) -> bool:
        return _count(observed) == 0 < _count(self._observed) and not self._explains(self._observed)

    def _read(self, response: HealthResponse) -> tuple[ConsulSnapshot, float]:
        """Parse a response; returns the snapshot and the processing time in seconds."""
        began_s = self._clock()
        assert response.body is not None, "a response without changes has no body to parse"
        observed = observed_of(response.index, self._reader.entries(response.body))
        return observed, self._clock() - began_s

    def _deliver(self, observed: ConsulSnapshot) -> float:
        """Pass a snapshot to `on_observed`; returns the processing time in seconds."""
        began_s = self._clock()
        self._observed = observed
        self._on_observed(self._registry_id, observed)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()
        return self._clock() - began_s


def _count(observed: ConsulSnapshot) -> int:
    return sum(not isinstance(entry.record.member, Replica) for entry in observed.entries)
