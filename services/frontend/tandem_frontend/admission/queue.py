"""The line of requests that wait for a place: who is next.

Pure: holds tickets and orders them, wakes nobody. Tenants take turns by the tokens they ask for, so that neither a
thousand requests nor a high priority of one tenant holds up another one's first. Within a tenant, a higher priority
goes first, then the earliest deadline, then the earlier request.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

GONE_MIN = 32
"""Fewer tickets that left are not worth tidying a heap for."""
LOOKED_AT_MAX = 4096
"""Tickets of one tenant times tenants: a few milliseconds at most for a newcomer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """What a request asks for."""

    tokens: int
    """Prompt and completion at most: the KV it may hold."""
    answer_tokens: int = 0
    """Completion at most, which its time depends on; 0: not known."""
    priority: int = 0
    """Higher goes earlier."""
    tenant: str = ""
    deadline_s: float | None = None
    """On the frontend's clock; None: it has none."""

    @property
    def urgency(self) -> tuple[int, float]:
        """The least goes first among a tenant's own."""
        return -self.priority, math.inf if self.deadline_s is None else self.deadline_s


@dataclass(slots=True)
class _Tenant(Generic[T]):
    turn: float
    """Tokens it was given, on a scale that all tenants share: the least goes next."""
    waiting_count: int = 0
    tokens: int = 0
    """Asked for by those of it that wait."""
    heap: list[tuple[tuple[int, float], int, T]] = field(default_factory=list)
    """(urgency, arrival, ticket); may hold tickets that have left."""


class RequestQueue(Generic[T]):
    """Tickets of those who wait."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        """With tickets that wait."""
        self._turns: dict[str, float] = {}
        """Turns of tenants that have none now, while they are ahead of whoever went last."""
        self._turn = 0.0
        """Of whoever went last: a tenant that comes anew begins there, not before."""
        self._demands: dict[T, QueuedRequest] = {}
        self._arrivals = itertools.count()
        self.tokens = 0
        """Tokens asked for by all who wait."""

    def __len__(self) -> int:
        return len(self._demands)

    def add(self, ticket: T, demand: QueuedRequest) -> None:
        """Join the line."""
        assert ticket not in self._demands, "one ticket twice"
        self._demands[ticket] = demand
        self.tokens += demand.tokens
        tenant = self._tenants.get(demand.tenant)
        if tenant is None:
            tenant = self._tenants[demand.tenant] = _Tenant(self._turn_of(demand.tenant))
            self._turns.pop(demand.tenant, None)
        tenant.waiting_count += 1
        tenant.tokens += demand.tokens
        heapq.heappush(tenant.heap, (demand.urgency, next(self._arrivals), ticket))

    def remove(self, ticket: T) -> None:
        """Leave the line without a place. Harmless for one who is not in it."""
        demand = self._demands.pop(ticket, None)
        if demand is None:
            return
        self.tokens -= demand.tokens
        tenant = self._tenants[demand.tenant]
        tenant.waiting_count -= 1
        tenant.tokens -= demand.tokens
        if not tenant.waiting_count:
            del self._tenants[demand.tenant]
            if tenant.turn > self._turn:
                # Who is not ahead would begin there anyway.
                self._turns[demand.tenant] = tenant.turn
        else:
            self._tidy(tenant)
        if not self._demands:
            # Nobody waits, so nobody is owed a turn.
            self._turns.clear()
            self._turn = 0.0

    def first(self) -> tuple[T, QueuedRequest] | None:
        """Who is next; None when nobody waits."""
        if not self._demands:
            return None
        tenant = min(self._tenants.values(), key=lambda tenant: (tenant.turn, tenant.heap[0][:2]))
        ticket = tenant.heap[0][2]
        return ticket, self._demands[ticket]

    def take(self) -> tuple[T, QueuedRequest]:
        """Take out who is next."""
        first = self.first()
        assert first is not None, "nobody waits"
        ticket, demand = first
        tenant = self._tenants[demand.tenant]
        self._turn = tenant.turn
        tenant.turn += demand.tokens
        self._turns = {name: turn for name, turn in self._turns.items() if turn > self._turn}
        self.remove(ticket)
        return ticket, demand

    def tokens_before(self, demand: QueuedRequest) -> int:
        """Tokens of those who go before a newcomer: his own tenant's that are as urgent, and other tenants' turns."""
        own = sum(
            waiting.tokens
            for waiting in self._demands.values()
            if waiting.tenant == demand.tenant and waiting.urgency <= demand.urgency
        )
        return self._with_others(demand.tenant, own)

    def overtaken(self, demand: QueuedRequest) -> Iterator[tuple[QueuedRequest, int]]:
        """Those that a newcomer would push back for his deadline's sake, each with the tokens that go before it now.

        None where so many wait that looking at each would take too long.
        """
        tenant = self._tenants.get(demand.tenant)
        if tenant is None or len(tenant.heap) * len(self._tenants) > LOOKED_AT_MAX:
            return
        own = 0
        for urgency, _, ticket in sorted(tenant.heap, key=lambda place: place[:2]):
            waiting = self._demands.get(ticket)
            if waiting is None:
                continue
            if urgency > demand.urgency and waiting.priority == demand.priority:
                yield waiting, self._with_others(demand.tenant, own)
            own += waiting.tokens

    def _with_others(self, name: str, own: int) -> int:
        """Tokens that go before, of a tenant whose own are so many: other tenants take their turns meanwhile."""
        turn = self._turn_of(name) + own
        others = (tenant for other, tenant in self._tenants.items() if other != name)
        return own + int(sum(min(max(0.0, turn - tenant.turn), tenant.tokens) for tenant in others))

    def _turn_of(self, name: str) -> float:
        """A tenant's turn, also of one that does not wait yet."""
        tenant = self._tenants.get(name)
        return tenant.turn if tenant is not None else max(self._turn, self._turns.get(name, 0.0))

    def _tidy(self, tenant: _Tenant[T]) -> None:
        """Forget tickets that have left: those at the head at once, the others when they are most of the heap."""
        if len(tenant.heap) - tenant.waiting_count > max(GONE_MIN, tenant.waiting_count):
            tenant.heap = [place for place in tenant.heap if place[2] in self._demands]
            heapq.heapify(tenant.heap)
        while tenant.heap[0][2] not in self._demands:
            heapq.heappop(tenant.heap)
