"""How busy a simulated engine is, in the terms of the engine port: counted as SGLang's own load snapshot counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from tandem.domain.worker import EngineLoad
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase


def load(legs: Collection[Leg], pool: KvPool) -> EngineLoad:
    """The figures of this moment."""
    phases = Counter(leg.phase for leg in legs)
    account = pool.account()
    page = pool.page_size_tokens
    waiting = [leg for leg in legs if leg.phase in (Phase.WAITING, Phase.RETRACTED)]
    return EngineLoad(
        running_requests=phases[Phase.RUNNING] + phases[Phase.PREFILLING],
        waiting_requests=len(waiting),
        waiting_tokens=sum(leg.sequence_tokens for leg in waiting),
        kv_used_tokens=(account.lent + account.transferring + account.withheld) * page,
        kv_capacity_tokens=pool.capacity_tokens,
        transferring_requests=phases[Phase.BOOTSTRAP] + phases[Phase.PREALLOCATING] + phases[Phase.TRANSFERRING],
        kv_transferring_tokens=account.transferring * page,
        kv_cached_tokens=account.cached * page,
        kv_free_tokens=account.free * page,
    )
