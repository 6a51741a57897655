"""Follows one service of Consul: each answer as a fleet, in the order of its indexes, under the name of its generation.

Owns blocking queries, what an index that goes backwards means, and the doubt in an answer that is suddenly empty.
Decides nothing about members.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from tandem.clock import Clock
from tandem.errors import ServiceError
from tandem.rpc.backoff import Backoff
from tandem_registry.backends.consul.client import Answer, ConsulClient, Generation
from tandem_registry.backends.consul.parsing import AnswerReader
from tandem_registry.backends.consul.records import Replica
from tandem_registry.backends.consul.snapshot import ConsulSnapshot, observed_of

log = logging.getLogger(__name__)

WAIT_S = 5.0
"""A silent Consul is noticed after this and the time for an answer."""
GAP_MIN_S = 0.02
"""Changes within this time make one step."""
GAP_FACTOR = 3
"""After an answer rest so many times what it took: a storm of changes costs a quarter of a core, not all of it."""
SUSPECT_PAUSE_S = 0.3
"""Before a suddenly empty answer is asked for again."""


class BlockingQuery:
    """One task's work."""

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
        """`on_observed` gets the registry id and the fleet at each new index; `on_lost` why there is no answer.

        `explains` says whether all members of a fleet have been ended by this replica, so that none may follow.
        """
        self._client = client
        self._new_id = new_id
        self._on_observed = on_observed
        self._on_lost = on_lost
        self._explains = explains
        self._clock = clock
        self._backoff = Backoff(rng=rng)
        self._reader = AnswerReader()
        self._registry_id = ""
        self._observed = ConsulSnapshot()
        self._arrived = asyncio.Event()
        self._refresh = asyncio.Lock()
        self._refresh_count = 0
        self.answered_s = clock()
        """When Consul answered last; until then, when this began."""

    async def run(self) -> None:
        """Follow without end."""
        while True:
            try:
                await self._follow()
            except ServiceError as problem:
                self._on_lost(problem)
                await asyncio.sleep(self._backoff.next_s())

    async def wait_for(self, accept: Callable[[], bool]) -> None:
        """Return as soon as it is so; looks after each answer. Bound it with asyncio.timeout."""
        while not accept():
            await self._arrived.wait()

    async def catch_up(self) -> None:
        """Return when everything has been told that Consul held when this was called.

        Raises:
            ServiceError: Consul cannot be asked.
        """
        wanted = self._refresh_count + 1
        async with self._refresh:
            # Whoever waited here meanwhile is served by the one question asked after all of them came.
            if self._refresh_count >= wanted:
                return
            self._refresh_count += 1
            index = await self._client.index()
            await self.wait_for(lambda: self._observed.index >= index)

    async def _follow(self) -> None:
        """Until the generation may be another one."""
        observed, read_s = self._read(await self._begin())
        while True:
            worked_s = read_s + self._tell(observed)
            self._backoff.reset()
            await asyncio.sleep(max(GAP_MIN_S, GAP_FACTOR * worked_s))
            answer = await self._client.health(Answer(observed.index, None), WAIT_S)
            self.answered_s = self._clock()
            if answer.index < observed.index:
                return
            if answer.body is None:
                if await self._is_another_generation():
                    return
                read_s = 0.0
                continue
            observed, read_s = self._read(answer)
            if self._is_suspect(observed):
                count = _count(self._observed)
                log.warning("Consul lists nobody at index %d, after %d entries: asked again", observed.index, count)
                await asyncio.sleep(SUSPECT_PAUSE_S)
                return

    async def _begin(self) -> Answer:
        """The first answer of a generation, or of one that goes on."""
        while True:
            before = await self._client.generation()
            answer = await self._client.health(is_consistent=True)
            self.answered_s = self._clock()
            is_known = before is not None and before.registry_id == self._registry_id
            if before is None or (is_known and answer.index < self._observed.index):
                await self._begin_generation(before, answer)
                continue
            after = await self._client.generation()
            if after != before:
                continue
            if not is_known:
                self._registry_id, self._observed = before.registry_id, ConsulSnapshot()
            return answer

    async def _begin_generation(self, before: Generation | None, answer: Answer) -> None:
        """Consul's data are new, or older than what was seen of them: revisions must not be counted on."""
        if await self._client.begin_generation(self._new_id(), before):
            log.warning("Consul begins anew at index %d (was at %d)", answer.index, self._observed.index)

    async def _is_another_generation(self) -> bool:
        now = await self._client.generation()
        return now is None or now.registry_id != self._registry_id

    def _is_suspect(self, observed: ConsulSnapshot) -> bool:
        return _count(observed) == 0 < _count(self._observed) and not self._explains(self._observed)

    def _read(self, answer: Answer) -> tuple[ConsulSnapshot, float]:
        """What an answer means, and how long it took to find out."""
        began_s = self._clock()
        assert answer.body is not None, "an answer that says that nothing changed"
        observed = observed_of(answer.index, self._reader.entries(answer.body))
        return observed, self._clock() - began_s

    def _tell(self, observed: ConsulSnapshot) -> float:
        """Hand on what Consul shows; returns how long that took."""
        began_s = self._clock()
        self._observed = observed
        self._on_observed(self._registry_id, observed)
        arrived, self._arrived = self._arrived, asyncio.Event()
        arrived.set()
        return self._clock() - began_s


def _count(observed: ConsulSnapshot) -> int:
    return sum(not isinstance(entry.record.member, Replica) for entry in observed.entries)
