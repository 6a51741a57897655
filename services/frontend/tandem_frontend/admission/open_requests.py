"""The requests that are open on this frontend, of all its models: the limits that hold before a queue is reached.

Owns the limit on open requests, the shares of it that one tenant and one model may hold, the rates of tenants, and the
refusal while the event loop is too late. `controller` queues what is admitted here, for each model by itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tandem.clock import Clock
from tandem.errors import Draining, Overloaded
from tandem.service.loop_load import LoopLoad
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.admission.shares import TenantRates, TenantShares, no_unread

LAG_MAX_S = 1.0
"""Default limit of the event loop's lag: the next token of every stream is delayed by that lag."""
RETRY_DELAY_MIN_S = 1.0
RETRY_DELAY_MAX_S = 30.0
CANCELLED_HOLD_S = 1.0
"""A request that its client cancels counts for its tenant so much longer: workers must start and abort its legs, and a
client that cancels thousands a second has none of them open. Those that had reached the workers count for its share of
these, too: others find workers that are not busy with starting and aborting alone."""
MODEL_SHARE = 0.75
"""Fraction of the open requests that one of several models may hold while no other holds any; less while others do. So
a model whose workers have stopped fills this frontend for no other."""

Delay = Callable[[], float]
"""Seconds after which a refused request should be sent again, by its model's queue."""


class OpenRequests:
    """Admits and refuses the requests of all models of one process."""

    def __init__(
        self,
        open_requests_max: int,
        clock: Clock,
        load: LoopLoad | None = None,
        lag_max_s: float = LAG_MAX_S,
        unread: Callable[[], Mapping[str, int]] = no_unread,
        *,
        tenant_share: float = 1.0,
        rates: TenantRates | None = None,
        background: BackgroundShare | None = None,
    ) -> None:
        """No request is open yet.

        Args:
            open_requests_max: requests open at a time, queued ones included; more are rejected.
            clock: of the rates and shares.
            load: measures this process's event loop.
            lag_max_s: new requests are rejected while the event loop is later than this.
            unread: how many long responses of each tenant are complete and unread by their clients; they count as open.
            tenant_share: fraction of `open_requests_max` that one tenant may hold while no other holds any.
            rates: requests that each tenant may send in a second; None: no limit.
            background: what requests of low priority may have; None: there are none.
        """
        self.background = background or BackgroundShare(0, 0.0, clock)
        self.tenant_share = tenant_share
        self._open_requests_max = open_requests_max
        self._load = load or LoopLoad()
        self._lag_max_s = lag_max_s
        self._unread = unread
        self._rates = rates or TenantRates(None, None, clock)
        self._open = TenantShares(tenant_share, clock)
        self._open_count = 0
        self._cancelled: Counter[str] = Counter()
        """By tenant, requests that were cancelled within `CANCELLED_HOLD_S`."""
        self._of_models = TenantShares(MODEL_SHARE, clock)
        self._models_count = 0
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_count(self) -> int:
        """Admitted requests that have not finished, queued ones included, or whose long responses are unread."""
        return self._open_count + self.unread_count

    @property
    def unread_count(self) -> int:
        """Long responses that are complete and not read by their clients."""
        return sum(self._unread().values())

    @property
    def tenant_requests_max(self) -> int:
        """Requests that one tenant may have open while no other has any: no request may have more choices."""
        return self._open.most(self._open_requests_max)

    def add_model(self) -> None:
        """One more model has requests here."""
        self._models_count += 1

    def remove_model(self) -> None:
        """One model less has requests here."""
        self._models_count -= 1

    def charge(self, tenant: str, count: int = 1, model: str = "", delay_s: Delay = lambda: RETRY_DELAY_MIN_S) -> None:
        """Charge a tenant's rate for a call of so many generations, which `admit` takes one by one afterwards.

        Raises:
            Draining, Overloaded: they would not be admitted.
        """
        self._check(tenant, count, model, delay_s)
        wait_s = self._rates.wait_s(tenant)
        if wait_s > 0:
            raise Overloaded(
                "this client has sent more requests than tenant_requests_per_second allows; each choice counts as one",
                retry_delay_s=min(RETRY_DELAY_MAX_S, wait_s),
                limit="tenant_requests_per_second",
            )
        self._rates.charge(tenant, count)

    @contextmanager
    def admit(self, tenant: str, model: str, delay_s: Delay) -> Iterator[None]:
        """Count as an open request of a tenant while the context is entered.

        Raises:
            Draining: this frontend is draining.
            Overloaded: the limit of open requests or the share of the tenant or of the model is reached, or the event
                loop is too late.
        """
        self._check(tenant, 1, model, delay_s)
        self._open_count += 1
        self._open.add(tenant)
        self._of_models.add(model)
        self._load.open()
        self._idle.clear()
        self.background.note_live(self._open_count)
        try:
            yield
        except asyncio.CancelledError:
            count_for_a_while(self._cancelled, tenant)
            raise
        finally:
            self._open_count -= 1
            self._open.remove(tenant)
            self._of_models.remove(model)
            self._load.close()
            self.background.note_live(self._open_count)
            if not self._open_count:
                self._idle.set()

    @contextmanager
    def admit_background(self) -> Iterator[None]:
        """Count as a request of low priority while the context is entered: no limit of live requests counts it.

        Raises:
            Draining: this frontend is draining.
        """
        self.check_open()
        self.background.begin()
        self._load.open()
        try:
            yield
        finally:
            self._load.close()
            self.background.end()

    @property
    def has_time(self) -> bool:
        """Whether this process has time for requests of low priority."""
        return not self._is_closed and self._load.late_s <= self._lag_max_s / 2

    def check_open(self) -> None:
        """Whether new requests are admitted at all.

        Raises:
            Draining: this frontend is draining.
        """
        if self._is_closed:
            raise Draining("this frontend is draining and accepts no new requests")

    def close(self) -> None:
        """Reject new requests from now on. Queued requests were admitted before, and stay."""
        self._is_closed = True

    async def wait_none(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    def _check(self, tenant: str, count: int, model: str, delay_s: Delay) -> None:
        """Whether so many requests of a tenant would be admitted now. Raises as `admit`."""
        self.check_open()
        unread, open_max = self._unread(), self._open_requests_max
        open_count = self._open_count + sum(unread.values()) + self._cancelled.total()
        if open_count + count > open_max:
            wanted = "" if count == 1 else f", and this one has {count} choices"
            raise Overloaded(
                f"{open_count} requests are open on this frontend, its limit is {open_max}{wanted}",
                retry_delay_s=delay_s(),
                limit="open_requests_max",
            )
        self._check_model(model, count, open_max - open_count, delay_s)
        held = self._open.held(tenant) + unread.get(tenant, 0) + self._cancelled[tenant]
        if not self._open.allows(held, count, open_max - open_count):
            wanted = "one more" if count == 1 else f"{count} more choices"
            raise Overloaded(
                f"this client has {held} open requests, and {wanted} would exceed its share of the "
                f"{open_max} that this frontend allows (tenant_share)",
                retry_delay_s=delay_s(),
                limit="tenant_share",
            )
        if self._load.late_s > self._lag_max_s:
            raise Overloaded(
                f"this frontend is overloaded: its event loop is {self._load.late_s:.1f} s late, "
                f"the limit is {self._lag_max_s:g} s",
                retry_delay_s=RETRY_DELAY_MIN_S,
                limit="overload_lag_s",
            )

    def _check_model(self, model: str, count: int, free: int, delay_s: Delay) -> None:
        """One of several models may not fill this frontend: its requests may wait for workers that do not come.

        A model alone may.
        """
        if self._models_count < 2:
            return
        held = self._of_models.held(model)
        if not self._of_models.allows(held, count, free):
            raise Overloaded(
                f"{held} requests of model {model} are open on this frontend, and {count} more would exceed the "
                f"model's share of the {self._open_requests_max} that it allows for all models",
                retry_delay_s=delay_s(),
                limit="model_share",
            )


def count_for_a_while(counts: Counter[str], tenant: str, on_end: Callable[[], None] = lambda: None) -> None:
    """Count a request of a tenant for `CANCELLED_HOLD_S`, and then call `on_end`."""

    def end() -> None:
        counts[tenant] -= 1
        if not counts[tenant]:
            del counts[tenant]
        on_end()

    counts[tenant] += 1
    asyncio.get_running_loop().call_later(CANCELLED_HOLD_S, end)
