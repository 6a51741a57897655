"""Admission control of one model: which of its queued requests goes to the workers next.

Limits: `open_requests` rejects at once what exceeds the limits of the whole frontend. A request beyond the free
capacity of the model's workers (requests, KV tokens), or whose prompt would wait too long in a prefill engine, is
queued. `queue` orders the queue, `capacity` computes the free capacity, `prefill_backlog` what prefill has to do,
`shares` what one tenant may have. Every decision is made before the first byte of a response.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Protocol

from tandem.clock import Clock
from tandem.errors import DeadlinePassed, Overloaded
from tandem_frontend.admission.background import OtherFrontends
from tandem_frontend.admission.open_requests import (
    RETRY_DELAY_MAX_S,
    RETRY_DELAY_MIN_S,
    OpenRequests,
    count_for_a_while,
)
from tandem_frontend.admission.prefill_backlog import PrefillBacklog, PrefillWork
from tandem_frontend.admission.queue import QueuedRequest, RequestQueue
from tandem_frontend.admission.shares import TenantShares
from tandem_frontend.admission.throughput import Throughput

SURE_SHARE, HOPELESS_SHARE = 0.9, 0.5
"""Quantiles of the service times of recent requests. A new request must have time left for the 90 % quantile, otherwise
it is rejected; a queued request without time for the median is not started. Under overload the most urgent requests go
first, so all of them run close to their deadlines: one shared limit would start requests that cannot finish."""
REEVALUATE_DELAY_S = 0.005
"""Changes within it are evaluated together: a large fleet reports its load hundreds of times a second."""
BACKGROUND_DELAY_S = 0.1
"""Until a request of low priority that found no capacity is tried again."""
WAIT_MARGIN = 2.0
"""Factor on the estimated queue wait: the queue may slow down to half its present speed after a request joined it."""


class Headroom(Protocol):
    """Free capacity of the workers."""

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        """KV tokens that a request is charged for, given its prompt and its longest completion."""
        ...

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether a request of `tokens` KV tokens fits beside those that this frontend already has on the workers."""
        ...


class Admission:
    """Admits, queues and rejects the requests of one model."""

    def __init__(
        self,
        requests: OpenRequests,
        headroom: Headroom,
        clock: Clock,
        prefill: PrefillBacklog | None = None,
        short_wait_s: float = math.inf,
        *,
        model: str = "",
        others: OtherFrontends | None = None,
    ) -> None:
        """Create an empty admission queue.

        Args:
            requests: limits the open requests of all models.
            headroom: free capacity of the workers. A tenant gets the share of it that it has of the open requests,
                while others are there or are expected back.
            clock: of the deadlines.
            prefill: what the prefill workers have to do; None: unlimited.
            short_wait_s: how long short prompts wait at most before they overtake long ones.
            model: name of the model.
            others: what other frontends have on the workers; None: no request of low priority comes.
        """
        self.requests = requests
        """The open requests of all models."""
        self._model = model
        self._others = others
        self._headroom = headroom
        self._clock = clock
        self._prefill = prefill or PrefillBacklog("", math.inf)
        self._queue: RequestQueue[asyncio.Future[PrefillWork]] = RequestQueue(clock, short_wait_s)
        self._open = TenantShares(requests.tenant_share, clock)
        """Open requests of this model by tenant."""
        self._open_count = 0
        self._counted_count = 0
        """Open requests of this model, those of low priority too."""
        self._held_requests = 0
        self._held_tokens = 0
        self._held_tokens_of: Counter[str] = Counter()
        self._held = TenantShares(requests.tenant_share, clock)
        self._aborted: Counter[str] = Counter()
        """By tenant, requests that were cancelled on the workers within `CANCELLED_HOLD_S`."""
        self._throughput = Throughput(clock)
        self._reevaluation: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_count(self) -> int:
        """Admitted requests of this model that have not finished, queued ones included."""
        return self._open_count

    @property
    def tenant_requests_max(self) -> int:
        """See `OpenRequests`."""
        return self.requests.tenant_requests_max

    @property
    def waiting_count(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def charge(self, tenant: str, count: int = 1) -> None:
        """Charge a tenant's rate for a call of so many generations, which `admit` takes one by one afterwards.

        Raises:
            Draining, Overloaded: they would not be admitted.
        """
        self.requests.charge(tenant, count, self._model, self._queue_delay_s)

    @contextmanager
    def admit(self, tenant: str = "") -> Iterator[None]:
        """Count as an open request of a tenant while the context is entered.

        Raises:
            Draining, Overloaded: see `OpenRequests.admit`.
        """
        with self.requests.admit(tenant, self._model, self._queue_delay_s), self._counted():
            self._open_count += 1
            self._open.add(tenant)
            try:
                yield
            finally:
                self._open_count -= 1
                self._open.remove(tenant)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Keep the model, which ends with its last request."""
        self._counted_count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._counted_count -= 1
            if not self._counted_count:
                self._idle.set()

    @contextmanager
    def admit_background(self) -> Iterator[None]:
        """Count as a request of low priority while the context is entered: no limit of live requests counts it.

        Raises:
            Draining: this frontend is draining.
        """
        with self.requests.admit_background(), self._counted():
            yield

    def check_open(self) -> None:
        """Whether new requests are admitted at all.

        Raises:
            Draining: this frontend is draining.
        """
        self.requests.check_open()

    def has_spare(self) -> bool:
        """Whether a row of a batch may start, as far as is known before its request has been read."""
        unstarted = self.requests.background.unstarted
        mean_tokens = self._held_tokens // self._held_requests if self._held_requests else 0
        return self._spares(unstarted, unstarted * mean_tokens, 1, 0)

    def _spares(self, more_requests: int, more_tokens: int, tokens: int, prompt_tokens: int) -> bool:
        """Whether a request of low priority may use the workers beside what this frontend has there and `more_…`: no
        live one waits, and some capacity stays free.
        """
        if len(self._queue) or not self.requests.has_time:
            return False
        requests, kv_tokens = self._held_requests + more_requests + 1, self._held_tokens + more_tokens + tokens
        has_capacity = self._others is None or self._others.fits_beside(
            requests + self._held.reserved(requests), kv_tokens + self._held.reserved(kv_tokens)
        )
        # Each request fits somewhere, also one that needs more than what usually stays free.
        return (has_capacity or requests == 1) and self._prefill.has_room(prompt_tokens)

    def note_others(self) -> None:
        """Look at the load of other frontends; called several times a second while rows wait or run."""
        if self._others is not None:
            self._others.look(self._held_requests, self._held_tokens)

    @asynccontextmanager
    async def background_slot(self, request: QueuedRequest) -> AsyncIterator[PrefillWork]:
        """`slot` for a request of low priority, which does not wait here: a live one might have to wait behind it.

        Raises:
            Overloaded: live requests need the capacity.
        """
        charged = self._headroom.counted(request.tokens - request.answer_tokens, request.answer_tokens)
        if not self._spares(0, 0, charged, request.prompt_tokens):
            raise Overloaded(
                "live requests need the capacity of the workers", retry_delay_s=BACKGROUND_DELAY_S, limit="batch"
            )
        self._held_requests += 1
        self._held_tokens += charged
        work = self._prefill.reserve(request.prompt_tokens, self.reevaluate_soon)
        try:
            yield work
        finally:
            work.drop()
            self._held_requests -= 1
            self._held_tokens -= charged
            self.reevaluate()

    @asynccontextmanager
    async def slot(self, request: QueuedRequest) -> AsyncIterator[PrefillWork]:
        """Wait in the queue until the workers have capacity for the request, and hold that capacity.

        Yields its prompt's place in the prefill backlog, which ends with the computation of the prompt.

        Raises:
            Overloaded: at the present throughput the request would miss its deadline.
            DeadlinePassed: the deadline passed in the queue.
        """
        charged = self._headroom.counted(request.tokens - request.answer_tokens, request.answer_tokens)
        request = replace(request, tokens=charged)
        work = await self._wait(request)
        begin_s = self._clock()
        try:
            yield work
        except asyncio.CancelledError:
            count_for_a_while(self._aborted, request.tenant, self.reevaluate_soon)
            raise
        finally:
            work.drop()
            self._throughput.note(request, self._clock() - begin_s)
            self._release(request)
            self.reevaluate()

    def reevaluate(self) -> None:
        """Start the queued requests that fit now. Called when a request has ended or the workers have changed."""
        while (first := self._next()) is not None:
            ticket, request = first
            if len(self._queue) > 1 and self._is_late(request, 0.0, HOPELESS_SHARE):
                # Others are queued: an engine must not spend time on a response that its client will not wait for.
                self._queue.remove(ticket)
                ticket.set_exception(self._too_late(request, 0.0, HOPELESS_SHARE))
                continue
            self._queue.take(ticket)
            ticket.set_result(self._hold(request))

    def _next(self) -> tuple[asyncio.Future[PrefillWork], QueuedRequest] | None:
        """The queued request that starts now; None: none does.

        Where only prefill holds up the next one, the first short prompt that an aggregated worker takes goes before it.
        """
        first = self._queue.first(self._is_within_share)
        if first is None or self._fits(first[1]):
            return first
        short_tokens = self._prefill.short_tokens
        if not short_tokens or not self._headroom.fits(self._held_requests, self._held_tokens, first[1].tokens):
            return None
        return self._queue.first_short(
            short_tokens, lambda request: self._fits(request) and self._is_within_share(request)
        )

    def reevaluate_soon(self) -> None:
        """`reevaluate` after a few milliseconds, once for all changes until then."""
        if self._reevaluation is None and len(self._queue):
            self._reevaluation = asyncio.get_running_loop().call_later(REEVALUATE_DELAY_S, self._reevaluate_now)

    async def wait_none(self) -> None:
        """Return when no request of this model is open."""
        await self._idle.wait()

    async def _wait(self, request: QueuedRequest) -> PrefillWork:
        if not len(self._queue) and self._fits(request) and self._is_within_share(request):
            return self._hold(request)
        self._reject_late(request)
        ticket: asyncio.Future[PrefillWork] = asyncio.get_running_loop().create_future()
        self._queue.add(ticket, request)
        self.reevaluate()
        try:
            async with asyncio.timeout(None if request.deadline_s is None else request.deadline_s - self._clock()):
                # Shielded, so that a request that leaves can still see whether it got its slot.
                return await asyncio.shield(ticket)
        except BaseException as problem:  # whatever ends the wait, a cancellation too, frees the slot
            if ticket.done() and ticket.exception() is None:
                # It got its slot in the same turn of the event loop in which it left.
                ticket.result().drop()
                self._release(request)
            self._queue.remove(ticket)
            self.reevaluate()
            if isinstance(problem, TimeoutError):
                raise DeadlinePassed("the deadline passed while the request waited for a worker") from None
            raise

    def _reevaluate_now(self) -> None:
        self._reevaluation = None
        self.reevaluate()

    def _reject_late(self, request: QueuedRequest) -> None:
        """Reject a request that would miss its deadline, or make queued requests of its tenant miss theirs."""
        if request.deadline_s is None:
            return
        before = self._queue.tokens_before(request)
        wait_s, least_wait_s = self._throughput.wait_s(before), self._throughput.least_wait_s(before)
        if wait_s is None or least_wait_s is None:
            return
        if self._is_late(request, WAIT_MARGIN * least_wait_s, SURE_SHARE):
            raise self._too_late(request, wait_s, SURE_SHARE)
        own_s = self._throughput.wait_s(request.tokens) or 0.0
        for other, others_before in self._queue.overtaken(request):
            wait_s = self._throughput.wait_s(others_before) or 0.0
            delayed_s = WAIT_MARGIN * wait_s + own_s
            # A queued request that misses its deadline in any case is no reason to reject this one.
            if self._is_late(other, delayed_s, SURE_SHARE) and not self._is_late(other, wait_s, HOPELESS_SHARE):
                raise Overloaded(
                    "requests that are queued already would miss their deadlines",
                    retry_delay_s=self._queue_delay_s(),
                )

    def _is_late(self, request: QueuedRequest, wait_s: float, share: float) -> bool:
        """Whether a request misses its deadline after `wait_s` in the queue plus the `share` quantile of service."""
        if request.deadline_s is None:
            return False
        return self._clock() + wait_s + self._throughput.service_s(request, share) >= request.deadline_s

    def _too_late(self, request: QueuedRequest, wait_s: float, share: float) -> Overloaded:
        left_s = max(0.0, (request.deadline_s or 0.0) - self._clock())
        service_s = self._throughput.service_s(request, share)
        return Overloaded(
            f"request would miss its deadline: estimated queue wait {wait_s:.1f} s + service {service_s:.1f} s, "
            f"{left_s:.1f} s remaining",
            retry_delay_s=self._queue_delay_s(),
        )

    def _fits(self, request: QueuedRequest) -> bool:
        has_capacity = self._headroom.fits(self._held_requests, self._held_tokens, request.tokens)
        return has_capacity and self._prefill.has_room(request.prompt_tokens)

    def _is_within_share(self, request: QueuedRequest) -> bool:
        """Whether the workers keep room for other tenants beside this request; true where no others are expected."""
        tenant = request.tenant
        held = self._held.held(tenant) + self._aborted[tenant]
        if not held or not self._open.has_others(tenant):
            return True
        # Asked first without a reserve, because that also brings the load of other frontends up to date.
        if not self._fits(request):
            return True
        requests, tokens = self._held.reserved(held), self._held.reserved(self._held_tokens_of[tenant])
        return self._headroom.fits(self._held_requests + requests, self._held_tokens + tokens, request.tokens)

    def _hold(self, request: QueuedRequest) -> PrefillWork:
        self._held_requests += 1
        self._held_tokens += request.tokens
        self._held.add(request.tenant)
        self._held_tokens_of[request.tenant] += request.tokens
        return self._prefill.reserve(request.prompt_tokens, self.reevaluate_soon)

    def _release(self, request: QueuedRequest) -> None:
        self._held_requests -= 1
        self._held_tokens -= request.tokens
        self._held.remove(request.tenant)
        self._held_tokens_of[request.tenant] -= request.tokens
        if not self._held_tokens_of[request.tenant]:
            del self._held_tokens_of[request.tenant]

    def _queue_delay_s(self) -> float:
        """When to retry: after the time that the queued tokens take."""
        wait_s = self._throughput.wait_s(self._queue.tokens)
        return min(RETRY_DELAY_MAX_S, max(RETRY_DELAY_MIN_S, wait_s or 0.0))
