"""The catalog of all metrics: name, kind, unit, meaning, emitting processes, and attributes with all their values.

Does not import OpenTelemetry, so that disabled metrics cost no import. docs/reference/metrics.md and the instruments
(`otel_metrics.py`) are generated from it, and a test changes the value of each row. Spans are in `span_names.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from tandem.domain.handover import DropReason
from tandem.domain.placement import Placement
from tandem.domain.request_state import LegRole, Phase
from tandem.domain.worker import WorkerRole, WorkerState
from tandem.errors import StartError, TandemError
from tandem.observability import metric_buckets as limits
from tandem.observability.metric_types import EVERY, Attribute, Metric
from tandem.observability.metric_types import Emitter as Emitter
from tandem.observability.metric_types import Kind as Kind

OTHER = "other"
"""Replaces every value that is not in the table, so that unexpected values cannot create new series."""
KNOWN_SERIES_MAX = 32
"""A counter with at most so many series exports all of them from the start, as 0: `rate()` needs a first sample."""
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

OPERATION = Attribute("gen_ai.operation.name", ("chat", "text_completion", "generate"))
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

OF_REQUEST = (OPERATION, PROVIDER, MODEL)


def _rows(emitter: Emitter) -> Callable[..., Metric]:
    """Factory of rows of one emitter."""

    def row(
        name: str, kind: Kind, unit: str, meaning: str, *attributes: Attribute, buckets: tuple[float, ...] = ()
    ) -> Metric:
        return Metric(name, kind, unit, meaning, (emitter,), attributes, buckets)

    return row


_frontend, _worker, _registry = _rows(Emitter.FRONTEND), _rows(Emitter.WORKER), _rows(Emitter.REGISTRY)
_parent = _rows(Emitter.PARENT)

TABLE: tuple[Metric, ...] = (
    _frontend(
        "gen_ai.server.request.duration",
        Kind.HISTOGRAM,
        "s",
        "Time from the arrival of a request to its end, successful or not; `error.type` is set on failure.",
        *OF_REQUEST,
        ERROR_TYPE,
        buckets=limits.REQUEST_S,
    ),
    _frontend(
        "gen_ai.server.time_to_first_token",
        Kind.HISTOGRAM,
        "s",
        "Time from the arrival of a request to its first token, including queue wait; finished requests only.",
        *OF_REQUEST,
        buckets=limits.FIRST_TOKEN_S,
    ),
    _frontend(
        "gen_ai.server.time_per_output_token",
        Kind.HISTOGRAM,
        "s",
        "Average time per output token after the first; finished requests only.",
        *OF_REQUEST,
        buckets=limits.TOKEN_S,
    ),
    _frontend(
        "gen_ai.client.token.usage",
        Kind.HISTOGRAM,
        "{token}",
        "Tokens per finished request. The conventions define only this name, for clients and servers.",
        *OF_REQUEST,
        TOKEN_TYPE,
        buckets=limits.TOKENS,
    ),
    _frontend(
        "tandem.connections.open", Kind.GAUGE, "{connection}", "Open connections from clients, edges and health checks."
    ),
    _frontend(
        "tandem.requests.open",
        Kind.GAUGE,
        "{request}",
        "Requests in progress, including queued ones. Without a model: complete long responses that are unread.",
        MODEL,
    ),
    _frontend("tandem.requests.admitted", Kind.COUNTER, "{request}", "Requests admitted by the frontend."),
    _frontend(
        "tandem.requests.refused",
        Kind.COUNTER,
        "{request}",
        "Requests rejected before any leg was dispatched, or by an engine because the request itself is wrong.",
        REASON,
    ),
    _frontend(
        "tandem.queue.depth",
        Kind.GAUGE,
        "{request}",
        "Requests in the queue of a model, waiting for capacity of its workers.",
        MODEL,
    ),
    _frontend(
        "tandem.models",
        Kind.GAUGE,
        "{model}",
        "Models of live workers, `served` or `refused`; the list of models says why.",
        MODEL_STATE,
    ),
    _frontend(
        "tandem.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "Time in the queue of a model; admitted requests only.",
        MODEL,
        buckets=limits.WAIT_S,
    ),
    _frontend(
        "tandem.pairs.chosen",
        Kind.COUNTER,
        "{attempt}",
        "Dispatched attempts, by routing policy and kind of route.",
        POLICY,
        ROUTE,
    ),
    _frontend(
        "tandem.placements",
        Kind.COUNTER,
        "{attempt}",
        "Dispatched attempts for which both pairs and aggregated workers could be used, by the reason of the choice.",
        PLACEMENT,
    ),
    _frontend(
        "tandem.route.choices",
        Kind.COUNTER,
        "{worker}",
        "Workers picked for dispatched attempts, by routing policy and role.",
        POLICY,
        ROLE,
    ),
    _frontend(
        "tandem.route.expected_cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens that the routing policy expected in the prefix cache of the worker it picked, where it knew and "
        "the leg finished. Compare with `tandem.route.cached_tokens`.",
        POLICY,
    ),
    _frontend(
        "tandem.route.cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens of finished legs that were in the prefix cache of the worker that computed the prompt.",
        POLICY,
    ),
    _frontend(
        "tandem.route.duration",
        Kind.HISTOGRAM,
        "s",
        "Time to pick the workers of an attempt.",
        buckets=limits.ROUTE_S,
    ),
    _frontend(
        "tandem.leg.failures",
        Kind.COUNTER,
        "{leg}",
        "Legs whose failure ended their attempt, by leg, phase and reason. A refused request is no failure.",
        LEG,
        PHASE,
        REASON,
    ),
    _frontend(
        "tandem.continuations",
        Kind.COUNTER,
        "{attempt}",
        "Attempts that continued a stream after its first token, by outcome.",
        ATTEMPT_OUTCOME,
    ),
    _frontend(
        "tandem.prefix.blocks",
        Kind.GAUGE,
        "{block}",
        "Different blocks in the frontend's index of cached blocks; those of a cache that was given up count until "
        "they are swept, seconds later.",
    ),
    _frontend(
        "tandem.prefix.workers",
        Kind.GAUGE,
        "{worker}",
        "Workers whose prefix cache the frontend follows; `suspected`: without credit until their next snapshot.",
        PREFIX_STATE,
    ),
    _frontend(
        "tandem.prefix.snapshots",
        Kind.COUNTER,
        "{snapshot}",
        "Snapshots of prefix caches that were applied to the end.",
    ),
    _frontend(
        "tandem.prefix.suspicions",
        Kind.COUNTER,
        "{suspicion}",
        "How often a worker's prefix cache lost its credit: events were missing (`gap`), the worker did not know "
        "(`unknown`), its stream broke or it was `silent`, another `epoch` answered, the index had no room (`bound`), "
        "or its hashes or blocks are not understood (`refused`).",
        SUSPICION,
    ),
    _frontend(
        "tandem.cancel.latency",
        Kind.HISTOGRAM,
        "s",
        "Time from a client's cancellation until the frontend has closed both legs and notified their engines.",
        buckets=limits.SHORT_S,
    ),
    _frontend(
        "tandem.tenant.requests",
        Kind.COUNTER,
        "{call}",
        "Calls that generate, by tenant and outcome, each with all its choices; those with an API key, or whose client "
        "names a tenant. A call that a limit refused at once is not counted here.",
        TENANT,
        CALL_OUTCOME,
    ),
    _frontend(
        "tandem.tenant.tokens",
        Kind.COUNTER,
        "{token}",
        "Tokens of these calls, as in their usage: a prompt counts once for all choices, and `cached` is a part of "
        "`prompt`. Those of failed and cancelled calls count from the dispatch on.",
        TENANT,
        TOKENS_KIND,
    ),
    _frontend(
        "tandem.tenant.refused",
        Kind.COUNTER,
        "{call}",
        "Calls that the tenant's quota refused, by the limit that was reached.",
        TENANT,
        QUOTA_LIMIT,
    ),
    _frontend("tandem.batch.open", Kind.GAUGE, "{batch}", "Batches that the process runs; only one process does."),
    _frontend("tandem.batch.rows.running", Kind.GAUGE, "{row}", "Rows of batches that run."),
    _frontend(
        "tandem.batch.rows",
        *(Kind.COUNTER, "{row}"),
        "Runs of batch rows: `stopped` made room for live requests, `repeated` is tried again after a failure.",
        BATCH_OUTCOME,
    ),
    _worker("tandem.legs.open", Kind.GAUGE, "{leg}", "Legs in progress on the worker."),
    _worker(
        "tandem.leg.duration",
        Kind.HISTOGRAM,
        "s",
        "Time from the acceptance of a leg to its end. `cancelled`: its frontend closed the call.",
        LEG,
        LEG_OUTCOME,
        buckets=limits.REQUEST_S,
    ),
    _worker(
        "tandem.leg.abort.duration",
        Kind.HISTOGRAM,
        "s",
        "Time from the cancellation of a leg by its frontend until the engine has released it.",
        LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.engine.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "Time from the engine's acceptance of a request to the start of its prefill, as reported by the engine.",
        LEG,
        buckets=limits.WAIT_S,
    ),
    _worker(
        "tandem.prefill.duration",
        Kind.HISTOGRAM,
        "s",
        "Duration of the prefill forward passes, as reported by the engine.",
        LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bytes",
        Kind.COUNTER,
        "By",
        "KV bytes sent (prefill) or received (decode), as counted by the engine's transfer backend.",
        LEG,
    ),
    _worker(
        "tandem.kv.transfer.duration",
        Kind.HISTOGRAM,
        "s",
        "Duration of the KV transfer of a request, as reported by the engine; not reported by SGLang decode engines.",
        LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bandwidth",
        Kind.HISTOGRAM,
        "By/s",
        "KV transfer bytes per second of each request.",
        LEG,
        buckets=limits.BANDWIDTH,
    ),
    _worker("tandem.prompt.tokens", Kind.COUNTER, "{token}", "Prompt tokens of finished legs.", LEG),
    _worker(
        "tandem.prompt.cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens of finished legs found in the engine's prefix cache, as reported by the engine.",
        LEG,
    ),
    _worker(
        "tandem.cache.hit_ratio",
        Kind.GAUGE,
        "1",
        "Cached divided by all prompt tokens of the last 256 finished legs.",
    ),
    _worker(
        "tandem.engine.requests",
        Kind.GAUGE,
        "{request}",
        "Requests in the engine by state; `transferring`: waiting for the KV transfer to or from the other leg.",
        ENGINE_STATE,
    ),
    _worker(
        "tandem.engine.waiting_tokens",
        Kind.GAUGE,
        "{token}",
        "Tokens of the requests that wait in the engine. On prefill: the prompts before which a new one has no turn.",
    ),
    _worker(
        "tandem.kv.pages",
        Kind.GAUGE,
        "{page}",
        "KV cache pages: `used` by requests, `cached` (evictable prefix cache), `free`. Where the engine does not "
        "report cached pages, they count as free.",
        PAGE_STATE,
    ),
    _worker("tandem.kv.pages.capacity", Kind.GAUGE, "{page}", "Total KV cache pages of the engine."),
    _worker(
        "tandem.engine.healthy",
        Kind.GAUGE,
        "1",
        "1: the engine emits tokens or answers its canary, and can hand over KV; 0: it does not, and the worker is "
        "NOT_SERVING.",
    ),
    _worker("tandem.adapters", Kind.GAUGE, "{adapter}", "LoRA adapters that the worker serves beside its model."),
    _worker(
        "tandem.role.change.duration",
        Kind.HISTOGRAM,
        "s",
        "Time of a change to this role, its drain included, until the worker serves again. `restarted`: by an engine "
        "that was started anew.",
        ROLE,
        ROLE_CHANGE_OUTCOME,
        buckets=limits.REQUEST_S,
    ),
    _worker(
        "tandem.engine.messages.dropped",
        Kind.COUNTER,
        "{message}",
        "Messages and requests that the engine's ports for the KV hand-over dropped because no engine had sent them, "
        "or they could not be read.",
        DROP_REASON,
    ),
    _registry(
        "tandem.members",
        Kind.GAUGE,
        "{member}",
        "Members of the view, by role and state; 0 for a role without members.",
        MEMBER_ROLE,
        MEMBER_STATE,
    ),
    _registry("tandem.watchers", Kind.GAUGE, "{watcher}", "Watch streams of frontends and edges on this registry."),
    _registry(
        "tandem.lease.age",
        Kind.GAUGE,
        "s",
        "Time since the last keepalive of each worker whose lease this registry holds.",
        WORKER_ID,
    ),
    _registry("tandem.lease.ttl", Kind.GAUGE, "s", "Age at which a lease expires."),
    _registry(
        "tandem.view.live",
        Kind.GAUGE,
        "1",
        "1: the view is current; 0: Consul is unreachable and the registry serves the last known view.",
    ),
    _registry(
        "tandem.consul.answer.age",
        Kind.GAUGE,
        "s",
        "Time since Consul's last response; consul backend only.",
    ),
    _registry(
        "tandem.consul.index_lag",
        Kind.GAUGE,
        "{index}",
        "How far the published view lags behind Consul's last response; consul backend only.",
    ),
    _parent(
        "tandem.processes",
        Kind.GAUGE,
        "{process}",
        "Processes of this frontend by state; `open`: reachable but not serving yet, `silent`: not responding.",
        PROCESS_STATE,
    ),
    _parent("tandem.process.restarts", Kind.COUNTER, "{restart}", "Restarts of processes of this frontend."),
    Metric("tandem.drains", Kind.COUNTER, "{drain}", "Drains started by this process.", EVERY),
    Metric(
        "tandem.event_loop.lag",
        Kind.HISTOGRAM,
        "s",
        "Delay of an event loop timer, sampled four times per second.",
        EVERY,
        buckets=limits.SHORT_S,
    ),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in TABLE}


def bounded(metric: Metric, attributes: Mapping[str, str]) -> dict[str, str]:
    """The attributes, with `OTHER` for each value that is not in the catalog."""
    known = {attribute.name: attribute.values for attribute in metric.attributes}
    assert attributes.keys() <= known.keys(), f"{metric.name} has no attribute {attributes.keys() - known.keys()}"
    return {name: value if not known[name] or value in known[name] else OTHER for name, value in attributes.items()}


def combinations(metric: Metric) -> list[dict[str, str]]:
    """Attributes of all series of a metric; empty when they are unknown or more than `KNOWN_SERIES_MAX`."""
    names = [attribute.name for attribute in metric.attributes]
    values = [attribute.values for attribute in metric.attributes]
    if math.prod(map(len, values)) > KNOWN_SERIES_MAX:
        return []
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
