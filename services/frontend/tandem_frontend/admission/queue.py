"""The request queue: fair between tenants, by priority and deadline within a tenant.

Pure: orders tickets and wakes no task. Fair queueing by virtual time: a tenant's virtual time grows by the tokens of
each request that it starts, and the tenant with the least goes next. So neither a thousand requests nor a high priority
of one tenant delays another tenant's first request. Within a tenant, a higher priority goes first, then the earlier
deadline, then the earlier arrival. Except that a short prompt that has waited for a while overtakes long ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tandem.clock import Clock, monotonic

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
    prompt_tokens: int = 0
    """What prefill has to compute; 0: not known."""
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
    """(urgency, arrival, ticket); may contain removed tickets, though not at its head."""
    by_size: dict[int, OrderedDict[T, float]] = field(default_factory=dict)
    """Ticket to arrival time, oldest first, by the bit length of the prompt's token count."""
    overtaking_tokens: int = 0
    """Prompt tokens that may yet overtake before the next prompt goes in its turn; below 0: none."""

    @property
    def order(self) -> tuple[float, tuple[int, float], int]:
        """Sort key among the tenants; the least goes next. No two tenants, and no two heads of one, have the same."""
        return self.virtual_time, *self.heap[0][:2]

    def queue_by_size(self, ticket: T, prompt_tokens: int, arrival_s: float) -> None:
        """Add a ticket to those of its size."""
        self.by_size.setdefault(prompt_tokens.bit_length(), OrderedDict())[ticket] = arrival_s

    def unqueue_by_size(self, ticket: T, prompt_tokens: int) -> None:
        """Remove a ticket from those of its size."""
        size = self.by_size[prompt_tokens.bit_length()]
        del size[ticket]
        if not size:
            del self.by_size[prompt_tokens.bit_length()]


class RequestQueue(Generic[T]):
    """Queued requests, each under a ticket of its owner's choice."""

    def __init__(self, clock: Clock = monotonic, short_wait_s: float = math.inf) -> None:
        """`short_wait_s`: how long a short prompt waits at most before it overtakes its tenant's long ones."""
        self._clock = clock
        self._short_wait_s = short_wait_s
        self._tenants: dict[str, _Tenant[T]] = {}
        """With queued requests."""
        self._order: list[tuple[tuple[float, tuple[int, float], int], str]] = []
        """Heap of (order, tenant): the present order of every tenant, and some that have changed since."""
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
        arrival = next(self._arrivals)
        heapq.heappush(tenant.heap, (request.urgency, arrival, ticket))
        if tenant.heap[0][1] == arrival:
            self._enter(request.tenant, tenant)
        tenant.queue_by_size(ticket, request.prompt_tokens, self._clock())

    def remove(self, ticket: T) -> None:
        """Drop a request without starting it. Does nothing when it is not queued."""
        request = self._requests.pop(ticket, None)
        if request is None:
            return
        self.tokens -= request.tokens
        tenant = self._tenants[request.tenant]
        tenant.waiting_count -= 1
        tenant.tokens -= request.tokens
        tenant.unqueue_by_size(ticket, request.prompt_tokens)
        if not tenant.waiting_count:
            del self._tenants[request.tenant]
            if tenant.virtual_time > self._virtual_time:
                # Kept, so that a tenant does not lose its debt by queueing one request at a time.
                self._virtual_times[request.tenant] = tenant.virtual_time
        else:
            arrival = tenant.heap[0][1]
            self._prune(tenant)
            if tenant.heap[0][1] != arrival:
                self._enter(request.tenant, tenant)
        if not self._requests:
            # An empty queue means capacity for all: no tenant has been at another one's expense.
            self._order.clear()
            self._virtual_times.clear()
            self._virtual_time = 0.0

    def first(self, allows: Callable[[QueuedRequest], bool] = lambda _: True) -> tuple[T, QueuedRequest] | None:
        """The request that goes next; None when there is none. A tenant is passed over whose request is not allowed."""
        next_tenant = self._next_tenant()
        if next_tenant is None:
            return None
        found = self._next_of(next_tenant)
        if allows(found[1]):
            return found
        for tenant in sorted(self._tenants.values(), key=lambda tenant: tenant.order):
            if tenant is not next_tenant and allows((found := self._next_of(tenant))[1]):
                return found
        return None

    def first_short(self, tokens_max: int, fits: Callable[[QueuedRequest], bool]) -> tuple[T, QueuedRequest] | None:
        """The first request with a prompt of at most `tokens_max` tokens that fits, whatever waits before it.

        Looks at the oldest of each size, in the order of tenants.
        """
        for tenant in sorted(self._tenants.values(), key=lambda tenant: tenant.order):
            for bits in range(1, tokens_max.bit_length() + 1):
                if bits in tenant.by_size:
                    ticket = next(iter(tenant.by_size[bits]))
                    request = self._requests[ticket]
                    if request.prompt_tokens <= tokens_max and fits(request):
                        return ticket, request
        return None

    def take(self, ticket: T | None = None) -> tuple[T, QueuedRequest]:
        """Remove and return the request that goes next, or the one of a ticket that another method has returned."""
        if ticket is None:
            first = self.first()
            assert first is not None, "the queue is empty"
            ticket = first[0]
        request = self._requests[ticket]
        tenant = self._tenants[request.tenant]
        # A tenant that was passed over may be behind it.
        self._virtual_time = max(self._virtual_time, tenant.virtual_time)
        tenant.virtual_time += request.tokens
        goes_in_turn = ticket == tenant.heap[0][2]
        if goes_in_turn:
            tenant.overtaking_tokens = request.prompt_tokens
        else:
            tenant.overtaking_tokens -= request.prompt_tokens
        self._virtual_times = {name: time for name, time in self._virtual_times.items() if time > self._virtual_time}
        self.remove(ticket)
        if not goes_in_turn:
            # The head is the same, but the tenant's turn comes later now.
            self._enter(request.tenant, tenant)
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

    def _next_tenant(self) -> _Tenant[T] | None:
        while self._order:
            order, name = self._order[0]
            tenant = self._tenants.get(name)
            if tenant is not None and tenant.order == order:
                return tenant
            heapq.heappop(self._order)
        return None

    def _next_of(self, tenant: _Tenant[T]) -> tuple[T, QueuedRequest]:
        ticket = self._overtaking(tenant)
        if ticket is None:
            ticket = tenant.heap[0][2]
        return ticket, self._requests[ticket]

    def _overtaking(self, tenant: _Tenant[T]) -> T | None:
        """The oldest short prompt that has waited for long enough to go before the tenant's next one; None: none.

        Between two prompts that go in their turn, short ones of as many tokens overtake: long ones are never stopped.
        """
        next_request = self._requests[tenant.heap[0][2]]
        if tenant.overtaking_tokens < 0:
            return None
        latest_s = self._clock() - self._short_wait_s
        oldest: tuple[float, T] | None = None
        # Shorter than half of the next prompt; with a quarter of its tokens always.
        for bits in range(1, (next_request.prompt_tokens // 2).bit_length()):
            if bits not in tenant.by_size:
                continue
            ticket, arrival_s = next(iter(tenant.by_size[bits].items()))
            is_as_urgent = self._requests[ticket].priority >= next_request.priority
            if is_as_urgent and arrival_s <= latest_s and (oldest is None or arrival_s < oldest[0]):
                oldest = arrival_s, ticket
        return None if oldest is None else oldest[1]

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

    def _enter(self, name: str, tenant: _Tenant[T]) -> None:
        """Enter a tenant in its present order, which makes what was entered of it before void."""
        heapq.heappush(self._order, (tenant.order, name))
        if len(self._order) > 2 * len(self._tenants) + REMOVED_MIN:
            self._order = [(tenant.order, name) for name, tenant in self._tenants.items()]
            heapq.heapify(self._order)

    def _prune(self, tenant: _Tenant[T]) -> None:
        """Drop removed tickets from a heap: those at its head at once, the others when they are most of it."""
        if len(tenant.heap) - tenant.waiting_count > max(REMOVED_MIN, tenant.waiting_count):
            tenant.heap = [entry for entry in tenant.heap if entry[2] in self._requests]
            heapq.heapify(tenant.heap)
        while tenant.heap[0][2] not in self._requests:
            heapq.heappop(tenant.heap)
