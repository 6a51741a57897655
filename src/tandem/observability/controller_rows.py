"""The controller's rows of the catalog of metrics."""

from __future__ import annotations

from tandem.domain.decision import Why
from tandem.domain.worker import WorkerRole
from tandem.observability.metric_types import Attribute, Emitter, Kind, Metric

DECISION = Attribute("tandem.reason", tuple(why.value for why in Why))
ROLE = Attribute("tandem.role", (WorkerRole.PREFILL.value, WorkerRole.DECODE.value))
OUTCOME = Attribute("tandem.outcome", ("done", "refused", "failed"))
EMITTERS = (Emitter.CONTROLLER,)

CONTROLLER_ROWS = (
    Metric(
        "tandem.controller.decisions",
        Kind.COUNTER,
        "{decision}",
        "Decisions of a controller that leads, by reason: `change`, or what kept the roles as they are.",
        EMITTERS,
        (DECISION,),
    ),
    Metric(
        "tandem.controller.changes",
        Kind.COUNTER,
        "{change}",
        "Role changes that the controller asked for, by the new role.",
        EMITTERS,
        (ROLE, OUTCOME),
    ),
    Metric("tandem.controller.leader", Kind.GAUGE, "1", "1 while this controller leads, else 0.", EMITTERS),
    Metric(
        "tandem.controller.need",
        Kind.GAUGE,
        "{worker}",
        "Workers of a role that the load needs, fractions included, as last measured; 0 before. For autoscalers.",
        EMITTERS,
        (ROLE,),
    ),
)
