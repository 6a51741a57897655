"""The line of requests that wait for a place: who is next.

Pure: holds tickets and orders them, wakes nobody. A higher priority goes first. Within a priority, tenants take turns
by the tokens they ask for, so that one tenant's thousand requests do not hold up another one's first. Within a tenant,
the earliest deadline goes first, then the earlier request.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request asks for."""

    tokens: int
    """Prompt and completion at most: the KV it may hold."""
    priority: int = 0
    """Higher goes earlier."""
    tenant: str = ""
    deadline_s: float | None = None
    """On the frontend's clock; None: it has none."""


@dataclass(slots=True)
class _Tenant(Generic[T]):
    turn: float
    """Tokens it was given, counted from when it last had nothing waiting: the least goes next."""
    waiting: list[tuple[float, int, T]] = field(default_factory=list)
    """Heap of (deadline, arrival, ticket)."""


class WaitingLine(Generic[T]):
    """Tickets of those who wait."""

    def __init__(self) -> None:
        self._classes: dict[int, dict[str, _Tenant[T]]] = {}
        self._demands: dict[T, Demand] = {}
        self._arrivals = itertools.count()
        self._turns: dict[int, float] = {}
        """For each priority, the turn of whoever went last: a tenant that comes anew begins there, not before."""
        self.tokens = 0
        """Tokens asked for by all who wait."""

    def __len__(self) -> int:
        return len(self._demands)

    def add(self, ticket: T, demand: Demand) -> None:
        """Join the line."""
        assert ticket not in self._demands, "one ticket twice"
        self._demands[ticket] = demand
        self.tokens += demand.tokens
        tenants = self._classes.setdefault(demand.priority, {})
        tenant = tenants.setdefault(demand.tenant, _Tenant(self._turns.get(demand.priority, 0.0)))
        deadline_s = math.inf if demand.deadline_s is None else demand.deadline_s
        heapq.heappush(tenant.waiting, (deadline_s, next(self._arrivals), ticket))

    def remove(self, ticket: T) -> None:
        """Leave the line without a place. Harmless for one who is not in it."""
        demand = self._demands.pop(ticket, None)
        if demand is not None:
            self.tokens -= demand.tokens
            self._forget_gone(demand.priority, demand.tenant)

    def first(self) -> tuple[T, Demand] | None:
        """Who is next; None when nobody waits."""
        if not self._demands:
            return None
        tenants = self._classes[max(self._classes)]
        tenant = min(tenants.values(), key=lambda tenant: (tenant.turn, tenant.waiting[0]))
        ticket = tenant.waiting[0][2]
        return ticket, self._demands[ticket]

    def take(self) -> tuple[T, Demand]:
        """Take out who is next."""
        first = self.first()
        assert first is not None, "nobody waits"
        ticket, demand = first
        tenant = self._classes[demand.priority][demand.tenant]
        self._turns[demand.priority] = tenant.turn
        tenant.turn += demand.tokens
        self.remove(ticket)
        return ticket, demand

    def tokens_before(self, demand: Demand) -> int:
        """Tokens of those who would certainly go before a newcomer: all of a higher priority, and his own tenant's."""
        return sum(
            waiting.tokens
            for waiting in self._demands.values()
            if waiting.priority > demand.priority
            or (waiting.priority == demand.priority and waiting.tenant == demand.tenant and _earlier(waiting, demand))
        )

    def _forget_gone(self, priority: int, name: str) -> None:
        tenants = self._classes[priority]
        waiting = tenants[name].waiting
        while waiting and waiting[0][2] not in self._demands:
            heapq.heappop(waiting)
        if not waiting:
            del tenants[name]
        if not tenants:
            del self._classes[priority]
            self._turns.pop(priority, None)


def _earlier(waiting: Demand, newcomer: Demand) -> bool:
    if newcomer.deadline_s is None:
        return True
    return waiting.deadline_s is not None and waiting.deadline_s <= newcomer.deadline_s
