"""An admission queue with the limits of a frontend that serves one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tandem_frontend.admission.background import BackgroundShare, OtherFrontends
from tandem_frontend.admission.controller import Admission, Headroom
from tandem_frontend.admission.open_requests import LAG_MAX_S, OpenRequests
from tandem_frontend.admission.prefill_backlog import PrefillBacklog
from tandem_frontend.admission.shares import TenantRates, no_unread

from tandem.clock import Clock
from tandem.service.loop_load import LoopLoad


def admission_of(
    open_requests_max: int,
    headroom: Headroom,
    clock: Clock,
    load: LoopLoad | None = None,
    lag_max_s: float = LAG_MAX_S,
    unread: Callable[[], Mapping[str, int]] = no_unread,
    *,
    prefill: PrefillBacklog | None = None,
    short_wait_s: float = math.inf,
    tenant_share: float = 1.0,
    rates: TenantRates | None = None,
    background: BackgroundShare | None = None,
    others: OtherFrontends | None = None,
) -> Admission:
    requests = OpenRequests(
        open_requests_max, clock, load, lag_max_s, unread,
        tenant_share=tenant_share, rates=rates, background=background,
    )  # fmt: skip
    return Admission(requests, headroom, clock, prefill, short_wait_s, others=others)
