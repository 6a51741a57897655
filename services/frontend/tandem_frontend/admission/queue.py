"""The request queue: fair between tenants, by priority and deadline within a tenant.

Pure: orders tickets and wakes no task. Fair queueing by virtual time: a tenant's virtual time grows by the tokens of
each request that it starts, and the tenant with the least goes next. So neither a thousand requests nor a high priority
of one tenant delays another tenant's first request. Within a tenant, a higher priority goes first, then the earlier
deadline, then the earlier arrival.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

REMOVED_MIN = 32
"""A heap with fewer removed tickets is not rebuilt: that costs more than it saves."""
OVERTAKEN_CHECKS_MAX = 4096
"""Tickets of one tenant times tenants that `overtaken` checks at most: a few milliseconds per new request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """What a request needs, and what decides when it starts."""

    tokens: int
    """KV tokens that it is charged for: prompt plus longest completion."""
    answer_tokens: int = 0
    """Longest completion in tokens, which its service time depends on; 0: not known."""
    priority: int = 0
    """Higher goes earlier."""
    tenant: str = ""
    deadline_s: float | None = None
    """On the frontend's clock; None: no deadline."""

    @property
    def urgency(self) -> tuple[int, float]:
        """Sort key among the requests of one tenant; the least goes first."""
        return -self.priority, math.inf if self.deadline_s is None else self.deadline_s


@dataclass(slots=True)
class _Tenant(Generic[T]):
    virtual_time: float
    """Tokens started so far, on a scale that all tenants share: the tenant with the least goes next."""
    waiting_count: int = 0
    tokens: int = 0
    """Of its queued requests."""
    heap: list[tuple[tuple[int, float], int, T]] = field(default_factory=list)
    """(urgency, arrival, ticket); may contain removed tickets."""


class RequestQueue(Generic[T]):
    """Queued requests, each under a ticket of its owner's choice."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        """With queued requests."""
        self._virtual_times: dict[str, float] = {}
        """Of tenants without queued requests, as long as they are ahead of `_virtual_time`."""
        self._virtual_time = 0.0
        """Of the tenant that went last. A new tenant starts here: an idle one must not save up credit."""
        self._requests: dict[T, QueuedRequest] = {}
        self._arrivals = itertools.count()
        self.tokens = 0
        """Of all queued requests."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, ticket: T, request: QueuedRequest) -> None:
        """Queue a request."""
        assert ticket not in self._requests, "one ticket twice"
        self._requests[ticket] = request
        self.tokens += request.tokens
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = _Tenant(self._virtual_time_of(request.tenant))
            self._virtual_times.pop(request.tenant, None)
        tenant.waiting_count += 1
        tenant.tokens += request.tokens
        heapq.heappush(tenant.heap, (request.urgency, next(self._arrivals), ticket))

    def remove(self, ticket: T) -> None:
        """Drop a request without starting it. Does nothing when it is not queued."""
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        self.tokens -= request.tokens
        tenant = self._tenants[request.tenant]
        tenant.waiting_count -= 1
        tenant.tokens -= request.tokens
        if not tenant.waiting_count:
            del self._tenants[request.tenant]
            if tenant.virtual_time > self._virtual_time:
                # Kept, so that a tenant does not lose its debt by queueing one request at a time.
                self._virtual_times[request.tenant] = tenant.virtual_time
        else:
            self._prune(tenant)
        if not self._requests:
            # An empty queue means capacity for all: no tenant has been at another one's expense.
            self._virtual_times.clear()
            self._virtual_time = 0.0

    def first(self, allows: Callable[[QueuedRequest], bool] = lambda _: True) -> tuple[T, QueuedRequest] | None:
        """The request that goes next; None when there is none. A tenant is passed over whose request is not allowed."""

        def turn(tenant: _Tenant[T]) -> tuple[float, tuple[tuple[int, float], int]]:
            return tenant.virtual_time, tenant.heap[0][:2]

        if not self._requests:
            return None
        tenant = min(self._tenants.values(), key=turn)
        ticket = tenant.heap[0][2]
        if allows(self._requests[ticket]):
            return ticket, self._requests[ticket]
        for tenant in sorted(self._tenants.values(), key=turn)[1:]:
            ticket = tenant.heap[0][2]
            if allows(self._requests[ticket]):
                return ticket, self._requests[ticket]
        return None

    def take(self, ticket: T | None = None) -> tuple[T, QueuedRequest]:
        """Remove and return the request that goes next, or the one of a ticket that `first` returned."""
        if ticket is None:
            first = self.first()
            assert first is not None, "the queue is empty"
            ticket = first[0]
        request = self._requests[ticket]
        tenant = self._tenants[request.tenant]
        # A tenant that was passed over may be behind it.
        self._virtual_time = max(self._virtual_time, tenant.virtual_time)
        tenant.virtual_time += request.tokens
        self._virtual_times = {name: time for name, time in self._virtual_times.items() if time > self._virtual_time}
        self.remove(ticket)
        return ticket, request

    def tokens_before(self, request: QueuedRequest) -> int:
        """Tokens that would go before a new request: those of its tenant that are as urgent, and of other tenants."""
        own = sum(
            queued.tokens
            for queued in self._requests.values()
            if queued.tenant == request.tenant and queued.urgency <= request.urgency
        )
        return self._with_others(request.tenant, own)

    def overtaken(self, request: QueuedRequest) -> Iterator[tuple[QueuedRequest, int]]:
        """Queued requests that a new one would overtake by its deadline, each with the tokens that go before it now.

        Yields nothing when the queue is too long to check each of them.
        """
        tenant = self._tenants.get(request.tenant)
        if tenant is None or len(tenant.heap) * len(self._tenants) > OVERTAKEN_CHECKS_MAX:
            return
        own = 0
        for urgency, _, ticket in sorted(tenant.heap, key=lambda entry: entry[:2]):
            queued = self._requests.get(ticket)
            if queued is None:
                continue
            if urgency > request.urgency and queued.priority == request.priority:
                yield queued, self._with_others(request.tenant, own)
            own += queued.tokens

    def _with_others(self, name: str, own: int) -> int:
        """`own` tokens of a tenant, plus those that other tenants start until it has started its own."""
        virtual_time = self._virtual_time_of(name) + own
        others = (tenant for other, tenant in self._tenants.items() if other != name)
        return own + int(sum(min(max(0.0, virtual_time - tenant.virtual_time), tenant.tokens) for tenant in others))

    def _virtual_time_of(self, name: str) -> float:
        """A tenant's virtual time, also of one without queued requests."""
        tenant = self._tenants.get(name)
        if tenant is not None:
            return tenant.virtual_time
        return max(self._virtual_time, self._virtual_times.get(name, 0.0))

    def _prune(self, tenant: _Tenant[T]) -> None:
        """Drop removed tickets from a heap: those at its head at once, the others when they are most of it."""
        if len(tenant.heap) - tenant.waiting_count > max(REMOVED_MIN, tenant.waiting_count):
            tenant.heap = [entry for entry in tenant.heap if entry[2] in self._requests]
            heapq.heapify(tenant.heap)
        while tenant.heap[0][2] not in self._requests:
            heapq.heappop(tenant.heap)
