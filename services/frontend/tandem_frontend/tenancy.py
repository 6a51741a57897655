"""What a frontend does by tenant: keeps prefix caches apart, enforces quotas, and records what each call has used.

Owns the order of it around a call. The rules are in `admission.quotas`, `preparation.cache_salt` and `call_usage`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from tandem.clock import monotonic
from tandem.errors import QuotaExceeded, TandemError
from tandem.observability.request_trace import CANCELLED, FAILED, FINISHED, REFUSED
from tandem_frontend.admission.quotas import Quotas
from tandem_frontend.call_context import Caller
from tandem_frontend.call_usage import UsageEntry, UsageSink
from tandem_frontend.preparation.cache_salt import CacheSharing
from tandem_frontend.response.writers import ClientCall

log = logging.getLogger(__name__)

Charge = Callable[[str, int], None]


class Tenancy:
    """The tenants of one frontend process."""

    def __init__(
        self,
        cache_sharing: CacheSharing = CacheSharing.TENANT,
        quotas: Quotas | None = None,
        sinks: Sequence[UsageSink] = (),
        *,
        on_quota: Callable[[], None] = lambda: None,
        on_refused: Callable[[str, str], None] = lambda tenant, limit: None,
    ) -> None:
        """Create it without tenants.

        Args:
            cache_sharing: who shares the workers' prefix caches.
            quotas: what each tenant has used; None: of this process alone.
            sinks: each is called with every call that has ended and that was not refused at once.
            on_quota: called with each call of a tenant that has a quota.
            on_refused: called with tenant and limit of each call that a quota refuses.
        """
        self.cache_sharing = cache_sharing
        self.quotas = quotas or Quotas(monotonic)
        self._sinks = sinks
        self._on_quota = on_quota
        self._on_refused = on_refused

    @contextlib.contextmanager
    def charged(self, caller: Caller, call: ClientCall, count: int, model: str, charge: Charge) -> Iterator[None]:
        """Charge a call of so many generations, and record its usage at the end. `charge` is admission's.

        Raises:
            QuotaExceeded, InvalidRequest: see `Quotas.check`.
            Draining, Overloaded: see `Admission.charge`.
        """
        tenant, quota = caller.tenant, caller.quota
        if quota:
            self._on_quota()
            call.set_initial_metadata(lambda: self.quotas.headers(tenant, quota))
            try:
                self.quotas.check(tenant, quota, count)
            except QuotaExceeded as refusal:
                self._on_refused(tenant, refusal.metadata["limit"])
                raise
        # Not after the quota is charged: a request that the frontend has no room for costs its tenant nothing.
        charge(caller.fairness_id, count)
        with self._recorded(caller, count, model), self.quotas.taken(tenant, quota, count):
            yield

    @contextlib.contextmanager
    def _recorded(self, caller: Caller, count: int, model: str) -> Iterator[None]:
        ending: BaseException | None = None
        try:
            yield
        except BaseException as problem:  # a cancelled call is recorded too, and each is raised again
            ending = problem
            raise
        finally:
            if self._sinks:
                self._record(caller, count, model, ending)

    def _record(self, caller: Caller, count: int, model: str, ending: BaseException | None) -> None:
        """`ending`: what ended the call, which is all that is known of one that no generation began for."""
        sums = caller.usage.summed()
        if ending is not None and not sums.request_id:
            sums.outcome, sums.reason = _outcome_of(ending)
        elif ending is not None and sums.outcome == FINISHED:
            # All was generated, and then the response could not be made or sent.
            is_gone = isinstance(ending, asyncio.CancelledError)
            sums.outcome, sums.reason = (CANCELLED, "client_left") if is_gone else (FAILED, _outcome_of(ending)[1])
        entry = UsageEntry(
            end_s=caller.time(),
            tenant=caller.tenant,
            call_id=caller.call_id,
            operation=caller.operation,
            model=model,
            choices=count,
            sums=sums,
        )
        for sink in self._sinks:
            try:
                sink(entry)
            except Exception:
                # A broad except is right here: a failing observer must not change the result of the call.
                log.exception("observer failed while recording the usage of a call; its line or metrics may be missing")


def _outcome_of(ending: BaseException) -> tuple[str, str]:
    """Outcome and reason of a call that ended before a generation began."""
    if isinstance(ending, asyncio.CancelledError):
        return CANCELLED, "client_left"
    if isinstance(ending, TandemError):
        return REFUSED, ending.reason
    return FAILED, TandemError.reason
