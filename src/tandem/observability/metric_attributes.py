"""The attributes of metrics, with all the values of each, and the bounds of those whose values are not known.

The metrics that use them are in `metric_catalog.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from tandem.domain.handover import DropReason
from tandem.domain.placement import Placement
from tandem.domain.request_state import LegRole, Phase
from tandem.domain.worker import WorkerRole, WorkerState
from tandem.errors import StartError, TandemError
from tandem.observability.metric_types import Attribute

OTHER = "other"
"""Replaces every value that is not in the table, so that unexpected values cannot create new series."""
WORKERS_MAX = 64
"""Maximum number of worker ids in the metrics of one process; further ones are aggregated as `OTHER`."""
TENANTS_MAX = 32
"""Maximum number of tenants in the metrics of one process: the first ones. Further ones are aggregated as `OTHER`."""


def _reasons() -> Iterator[str]:
    """Reasons of all errors that are sent over the wire."""

    def below(error: type[TandemError]) -> Iterator[type[TandemError]]:
        yield error
        for child in error.__subclasses__():
            yield from below(child)

    for error in below(TandemError):
        if not issubclass(error, StartError):
            yield error.reason


CANCELLED = "CANCELLED"
"""Used instead of a reason when the client cancelled."""
REASONS = tuple(sorted(set(_reasons())))
ROLES = tuple(role.value for role in WorkerRole)

GENERATION = Attribute("gen_ai.operation.name", ("chat", "text_completion", "generate"))
OPERATION = Attribute("gen_ai.operation.name", (*GENERATION.values, "embeddings"))
PROVIDER = Attribute("gen_ai.provider.name", ("tandem",))
MODEL = Attribute("gen_ai.request.model", bound="the models served by the frontend, at most models_max at a time")
ERROR_TYPE = Attribute("error.type", (*REASONS, CANCELLED))
TOKEN_TYPE = Attribute("gen_ai.token.type", ("input", "output"))

REASON = Attribute("tandem.reason", REASONS)
LEG = Attribute("tandem.leg", tuple(role.value for role in LegRole))
PHASE = Attribute("tandem.phase", tuple(phase.value for phase in Phase))
POLICY = Attribute("tandem.policy", ("random", "power_of_two", "least_work", "prefix", "session"))
ROLE = Attribute("tandem.role", ROLES)
ROUTE = Attribute("tandem.route", ("pair", "aggregated"))
PLACEMENT = Attribute("tandem.placement", tuple(placement.value for placement in Placement))
LEG_OUTCOME = Attribute("tandem.outcome", ("finished", "aborted", "failed", "refused", "cancelled"))
ATTEMPT_OUTCOME = Attribute("tandem.outcome", ("finished", "broken", "refused", "ended"))
ROLE_CHANGE_OUTCOME = Attribute("tandem.outcome", ("in_place", "restarted", "failed"))
KV_CHECK = Attribute("tandem.kv.check", ("matched", "unchecked", "corrupt"))
DROP_REASON = Attribute("tandem.reason", tuple(reason.value for reason in DropReason))
ENGINE_STATE = Attribute("tandem.state", ("running", "waiting", "transferring"))
PAGE_STATE = Attribute("tandem.state", ("used", "cached", "free"))
PROCESS_STATE = Attribute("tandem.state", ("starting", "open", "serving", "draining", "ended", "silent"))
PREFIX_STATE = Attribute("tandem.state", ("trusted", "suspected"))
MODEL_STATE = Attribute("tandem.state", ("served", "refused"))
SUSPICION = Attribute("tandem.reason", ("gap", "unknown", "broken", "silent", "epoch", "bound", "refused"))
MEMBER_STATE = Attribute("tandem.state", tuple(state.value for state in WorkerState))
MEMBER_ROLE = Attribute("tandem.role", (*ROLES, "frontend"))
WORKER_ID = Attribute(
    "tandem.worker.id", bound=f"{WORKERS_MAX} ids; further ones are aggregated as `{OTHER}`, by maximum"
)
TENANT = Attribute(
    "tandem.tenant", bound=f"the first {TENANTS_MAX} tenants of a process; further ones are aggregated as `{OTHER}`"
)
CALL_OUTCOME = Attribute("tandem.outcome", ("finished", "failed", "refused", "cancelled"))
TOKENS_KIND = Attribute("tandem.tokens", ("prompt", "cached", "completion"))
BATCH_OUTCOME = Attribute("tandem.batch.outcome", ("completed", "failed", "stopped", "repeated"))
QUOTA_LIMIT = Attribute("tandem.quota", ("requests_per_minute", "tokens_per_minute", "open_requests"))

OF_REQUEST, OF_GENERATION = (OPERATION, PROVIDER, MODEL), (GENERATION, PROVIDER, MODEL)
