"""Quotas of tenants, over the whole cluster: what each has used, here and elsewhere, and whether it may send more.

A quota of a minute is a bucket that holds a minute's worth and refills steadily. Every process of every frontend has
the whole bucket: it takes what it admits itself at once, and what the others admitted when `quota_exchange` reports it.
So a quota is never cut into pieces that a tenant cannot use, and what several admit at the same moment beyond it is
owed: the next requests wait until it is paid. Pure: no I/O, and time is passed in.

Prompts are charged when their length is known, completions when they end; what is used then may exceed the bucket too.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tandem.clock import Clock
from tandem.domain.quota import Quota, Spending
from tandem.errors import InvalidRequest, QuotaExceeded

MINUTE_S = 60.0
TENANTS_MAX = 10_000
"""Tenants that are known. Beyond it the one that was used least recently, with no open request, is forgotten."""
SOURCES_MAX = 1_024
"""Starts of other processes that are known for a tenant. Beyond it the oldest is forgotten."""
OPEN_RETRY_S = 1.0
"""When to retry beyond the limit of open requests: when one of them ends is unknown."""
RETRY_DELAY_MIN_S = 0.05
FRESH_S = 1.0
"""What a bucket gains in it is no sign that its process has been running for long."""


@dataclass(slots=True)
class Bucket:
    """What is left of one minute's limit."""

    left: float = math.inf
    counted_s: float = 0.0

    def refill(self, per_minute: int | None, now_s: float) -> None:
        """Count until now. A changed limit counts from now on."""
        if per_minute is None:
            self.left = math.inf
        elif math.isinf(self.left):
            self.left = float(per_minute)
        else:
            gained = max(0.0, now_s - self.counted_s) * per_minute / MINUTE_S
            self.left = min(float(per_minute), self.left + gained)
        self.counted_s = now_s

    def adopt(self, left: float, per_minute: int | None, age_s: float) -> None:
        """Another bucket of this limit held so much that long ago: this one holds no more."""
        if per_minute is not None:
            self.left = min(self.left, left + age_s * per_minute / MINUTE_S)

    def meet(self, left: float, own: int, per_minute: int | None, *, is_new: bool) -> None:
        """Another bucket of this limit holds so much, and its process has admitted `own` since its start.

        Where all of that still counts, as always for a tenant that `is_new` there, it comes on top of what is known
        here. Otherwise the bucket has been refilled meanwhile, and has heard of others: it counts as a whole.
        """
        if per_minute is None:
            return
        missing = per_minute - left
        if is_new or own <= missing + per_minute * FRESH_S / MINUTE_S:
            self.left -= max(0.0, min(own, missing))
        else:
            self.adopt(left, per_minute, 0.0)


@dataclass(slots=True)
class _Early:
    """A report of a tenant that has not come here yet."""

    spending: Spending
    noted_s: float


@dataclass(slots=True)
class _Used:
    """One tenant."""

    quota: Quota
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    own_requests: int = 0
    own_tokens: int = 0
    own_open: int = 0
    others: OrderedDict[str, Spending] = field(default_factory=OrderedDict)
    """By source."""

    @property
    def open_count(self) -> int:
        return self.own_open + sum(other.open_requests for other in self.others.values())

    def refill(self, now_s: float) -> None:
        self.requests.refill(self.quota.requests_per_minute, now_s)
        self.tokens.refill(self.quota.tokens_per_minute, now_s)


class Quotas:
    """What each tenant with a quota has used and may still use."""

    def __init__(self, clock: Clock, source: str = "") -> None:
        """`source`: this process and its start, for others."""
        self.source = source
        self.on_change: Callable[[str, str], None] = lambda source, tenant: None
        """Called with source and tenant after each change of what `known` returns."""
        self._clock = clock
        self._tenants: OrderedDict[str, _Used] = OrderedDict()
        self._early: OrderedDict[str, OrderedDict[str, _Early]] = OrderedDict()
        """By tenant and source, what others have reported of tenants that have not come here yet."""
        self._met: OrderedDict[str, None] = OrderedDict()
        """Sources that have reported all that they had: a tenant that one of them reports later is new there."""

    def check(self, tenant: str, quota: Quota, count: int = 1) -> None:
        """Check whether a tenant may send so many requests now. Charges nothing.

        Raises:
            QuotaExceeded: names the limit, and when it allows the next request.
            InvalidRequest: the choices of this request alone are more than may be open.
        """
        if not quota:
            return
        if quota.open_requests is not None and count > quota.open_requests:
            most = quota.open_requests
            raise InvalidRequest("n", f"{count} choices exceed this client's quota of {most} open_requests")
        used = self._used(tenant, quota)
        limit = quota.requests_per_minute
        # More choices than a minute's worth are let through by a full bucket, and owed: they could never be sent else.
        if limit is not None and used.requests.left < min(count, limit):
            missing = min(count, limit) - used.requests.left
            raise _refusal("requests_per_minute", limit, missing * MINUTE_S / limit)
        limit = quota.tokens_per_minute
        if limit is not None and used.tokens.left < 1:
            raise _refusal("tokens_per_minute", limit, (1 - used.tokens.left) * MINUTE_S / limit)
        limit = quota.open_requests
        if limit is not None and used.open_count + count > limit:
            raise _refusal("open_requests", limit, OPEN_RETRY_S)

    @contextmanager
    def taken(self, tenant: str, quota: Quota, count: int = 1) -> Iterator[None]:
        """Charge so many requests, which are open while the context is entered."""
        if not quota:
            yield
            return
        used = self._used(tenant, quota)
        used.requests.left -= count
        used.own_requests += count
        used.own_open += count
        self.on_change(self.source, tenant)
        try:
            yield
        finally:
            used.own_open -= count
            self.on_change(self.source, tenant)

    def spend(self, tenant: str, quota: Quota, tokens: int) -> None:
        """Charge tokens of a request that is open."""
        if not quota or not tokens:
            return
        used = self._used(tenant, quota)
        used.tokens.left -= tokens
        used.own_tokens += tokens
        self.on_change(self.source, tenant)

    def headers(self, tenant: str, quota: Quota) -> list[tuple[str, str]]:
        """The state of a quota now, as OpenAI's rate limit headers write it; empty without a quota."""
        if not quota:
            return []
        used, headers = self._used(tenant, quota), []
        for name, limit, bucket in (
            ("requests", quota.requests_per_minute, used.requests),
            ("tokens", quota.tokens_per_minute, used.tokens),
        ):
            if limit is not None:
                headers += [
                    (f"x-ratelimit-limit-{name}", str(limit)),
                    (f"x-ratelimit-remaining-{name}", str(max(0, math.floor(bucket.left)))),
                    (f"x-ratelimit-reset-{name}", spelt((limit - bucket.left) * MINUTE_S / limit)),
                ]
        if quota.open_requests is not None:
            left = max(0, quota.open_requests - used.open_count)
            headers += [
                ("x-ratelimit-limit-open-requests", str(quota.open_requests)),
                ("x-ratelimit-remaining-open-requests", str(left)),
            ]
        return headers

    # What processes report to each other.

    def own(self, tenant: str) -> Spending | None:
        """What this process has admitted of a tenant; None: nothing."""
        used = self._tenants.get(tenant)
        if used is None:
            return None
        used.refill(self._clock())
        return Spending(
            self.source,
            tenant,
            used.own_requests,
            used.own_tokens,
            used.own_open,
            used.requests.left,
            used.tokens.left,
        )

    def known(self, source: str, tenant: str) -> Spending | None:
        """What that process has admitted of a tenant, as far as this one knows; None: nothing."""
        if source == self.source:
            return self.own(tenant)
        used = self._tenants.get(tenant)
        if used is not None:
            return used.others.get(source)
        early = self._early.get(tenant, OrderedDict()).get(source)
        return None if early is None else early.spending

    def known_keys(self) -> list[tuple[str, str]]:
        """(source, tenant) of all that is known."""
        keys = [(self.source, tenant) for tenant in self._tenants]
        for tenant, used in self._tenants.items():
            keys += [(source, tenant) for source in used.others]
        for tenant, early in self._early.items():
            keys += [(source, tenant) for source in early]
        return keys

    def note(self, spending: Spending) -> None:
        """Another process reports."""
        source, tenant = spending.source, spending.tenant
        if source == self.source:
            return
        now_s = self._clock()
        used = self._tenants.get(tenant)
        if used is None:
            self._keep_early(spending, now_s)
        else:
            used.refill(now_s)
            self._apply(used, spending)
        self.on_change(source, tenant)

    def met(self, sources: Iterable[str]) -> None:
        """These processes have reported all that they had admitted."""
        for source in sources:
            self._met[source] = None
            self._met.move_to_end(source)
        while len(self._met) > SOURCES_MAX:
            self._met.popitem(last=False)

    def lost(self, sources: Iterable[str]) -> None:
        """These processes cannot be asked any more: none of their requests counts as open."""
        gone = set(sources)
        if not gone:
            return
        for tenant, used in self._tenants.items():
            for source in gone & used.others.keys():
                used.others[source] = replace(used.others[source], open_requests=0)
                self.on_change(source, tenant)
        for tenant, early in self._early.items():
            for source in gone & early.keys():
                early[source].spending = replace(early[source].spending, open_requests=0)
                self.on_change(source, tenant)

    def _apply(self, used: _Used, spending: Spending) -> None:
        """Charge what another process has admitted since its last report."""
        before = used.others.get(spending.source)
        if before is not None and _is_older(spending, before):
            return
        if before is None:
            # One that was met before has admitted all of it since then. Any other has for an unknown time: what is left
            # in its bucket says how much of it still counts.
            is_new = spending.source in self._met
            quota = used.quota
            used.requests.meet(spending.requests_left, spending.requests, quota.requests_per_minute, is_new=is_new)
            used.tokens.meet(spending.tokens_left, spending.tokens, quota.tokens_per_minute, is_new=is_new)
        else:
            used.requests.left -= spending.requests - before.requests
            used.tokens.left -= spending.tokens - before.tokens
        used.others[spending.source] = spending
        while len(used.others) > SOURCES_MAX:
            used.others.popitem(last=False)

    def _keep_early(self, spending: Spending, now_s: float) -> None:
        early = self._early.setdefault(spending.tenant, OrderedDict())
        if spending.source not in early or not _is_older(spending, early[spending.source].spending):
            early[spending.source] = _Early(spending, now_s)
        self._early.move_to_end(spending.tenant)
        while len(early) > SOURCES_MAX:
            early.popitem(last=False)
        while len(self._early) > TENANTS_MAX:
            self._early.popitem(last=False)

    def _used(self, tenant: str, quota: Quota) -> _Used:
        """The tenant, counted until now."""
        now_s = self._clock()
        used = self._tenants.get(tenant)
        if used is None:
            used = self._tenants[tenant] = _Used(quota)
            used.refill(now_s)
            self._take_early(used, tenant, now_s)
            self._forget_some()
        else:
            used.quota = quota
            used.refill(now_s)
            self._tenants.move_to_end(tenant)
        return used

    def _take_early(self, used: _Used, tenant: str, now_s: float) -> None:
        """Begin with what others have reported. Each bucket knows what the others did, so the emptiest counts."""
        for source, early in self._early.pop(tenant, OrderedDict()).items():
            age_s = now_s - early.noted_s
            used.requests.adopt(early.spending.requests_left, used.quota.requests_per_minute, age_s)
            used.tokens.adopt(early.spending.tokens_left, used.quota.tokens_per_minute, age_s)
            used.others[source] = early.spending

    def _forget_some(self) -> None:
        while len(self._tenants) > TENANTS_MAX:
            idle = next((name for name, used in self._tenants.items() if not used.own_open), None)
            if idle is None:
                return
            del self._tenants[idle]


def _is_older(spending: Spending, other: Spending) -> bool:
    """Whether a report came later than a newer one, by a longer way: sums only grow."""
    return spending.requests < other.requests or spending.tokens < other.tokens


def spelt(duration_s: float) -> str:
    """A time as OpenAI's headers write it: `120ms`, `8.64s`, `1m30s`. Never negative."""
    duration_ms = max(0, math.ceil(duration_s * 1_000))
    if duration_ms < 1_000:
        return f"{duration_ms}ms"
    minutes, rest_ms = divmod(duration_ms, 60_000)
    return f"{minutes}m{rest_ms / 1_000:g}s" if minutes else f"{rest_ms / 1_000:g}s"


def _refusal(name: str, limit: int, wait_s: float) -> QuotaExceeded:
    return QuotaExceeded(
        f"this client has used its quota of {limit} {name}", retry_delay_s=max(RETRY_DELAY_MIN_S, wait_s), limit=name
    )
