"""How much of a limited resource one tenant may hold, and how many requests a second it may send.

Pure: decides, and neither admits nor refuses. A tenant may hold what is less than a multiple of what is free (dynamic
thresholds, as in shared-memory switches). So a tenant alone gets a fixed share, several get equal ones, and some of the
resource always stays free for the next tenant: no reserve has to be set per tenant.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping

from tandem.clock import Clock

OTHERS_RECENT_S = 60.0
"""A tenant without open requests is expected back for so long."""
BUCKETS_MAX = 10_000
"""Tenants whose rates are known. Beyond it the one that was charged least recently is forgotten."""


class TenantShares:
    """Which tenants hold what, of one resource that all of them share."""

    def __init__(self, share: float, clock: Clock) -> None:
        """`share` is the fraction that a tenant may hold while no other holds any; 1: no limit."""
        self._share = share
        self._factor = math.inf if share >= 1 else share / (1 - share)
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._seen_s: OrderedDict[str, float] = OrderedDict()
        """When each of the two latest tenants came last: enough to know of another than any one tenant."""

    def held(self, tenant: str) -> int:
        """What a tenant holds."""
        return self._held[tenant]

    def add(self, tenant: str, count: int = 1) -> None:
        """A tenant holds so much more."""
        self._held[tenant] += count
        self._seen_s[tenant] = self._clock()
        self._seen_s.move_to_end(tenant)
        while len(self._seen_s) > 2:
            self._seen_s.popitem(last=False)

    def remove(self, tenant: str, count: int = 1) -> None:
        """A tenant holds so much less."""
        self._held[tenant] -= count
        if not self._held[tenant]:
            del self._held[tenant]

    def allows(self, held: int, count: int, free: int) -> bool:
        """Whether a tenant that holds `held` may hold `count` more, of which `free` are left.

        The last one that is free goes only to a tenant that holds none.
        """
        if count > free or math.isinf(self._factor):
            return count <= free
        before = held + count - 1
        return before == 0 or before < self._factor * (free - count)

    def most(self, total: int) -> int:
        """What one tenant may hold of `total` while no other holds any; at least 1."""
        return next(count for count in range(total, 0, -1) if self.allows(0, count, total))

    def reserved(self, held: int) -> int:
        """What must stay free beside a tenant that holds `held`."""
        return 0 if math.isinf(self._factor) else math.ceil(held / self._factor)

    def has_others(self, tenant: str) -> bool:
        """Whether another tenant holds some, or did within `OTHERS_RECENT_S`."""
        if len(self._held) > (tenant in self._held):
            return True
        recent_s = self._clock() - OTHERS_RECENT_S
        return any(seen_s >= recent_s for other, seen_s in self._seen_s.items() if other != tenant)


class TenantRates:
    """A token bucket for each tenant. A request of several choices may exceed it once, and is paid for afterwards."""

    def __init__(self, per_s: float | None, burst: int | None, clock: Clock) -> None:
        """`per_s`: None, no limit. `burst`: None, the requests of one second."""
        self._per_s = per_s
        self._burst = float(burst or max(1, math.ceil(per_s or 1)))
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Tokens left, and when they were counted."""

    def wait_s(self, tenant: str) -> float:
        """Seconds until a tenant may send its next request; 0: now."""
        if self._per_s is None:
            return 0.0
        return max(0.0, 1.0 - self._left(tenant)) / self._per_s

    def charge(self, tenant: str, count: int) -> None:
        """Take so many tokens; what is missing is owed."""
        if self._per_s is None:
            return
        self._buckets[tenant] = self._left(tenant) - count, self._clock()
        self._buckets.move_to_end(tenant)
        if len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)

    def _left(self, tenant: str) -> float:
        left, counted_s = self._buckets.get(tenant, (self._burst, 0.0))
        return min(self._burst, left + (self._clock() - counted_s) * (self._per_s or 0.0))


def no_unread() -> Mapping[str, int]:
    """No tenant has unread responses."""
    return {}
