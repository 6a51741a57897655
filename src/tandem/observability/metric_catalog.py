"""The catalog of all metrics: name, kind, unit, meaning, emitting processes, and attributes with all their values.

Does not import OpenTelemetry, so that disabled metrics cost no import. docs/reference/metrics.md and the instruments
(`otel_metrics.py`) are generated from it, and a test changes the value of each row. Spans are in `span_names.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

from tandem.observability import metric_attributes as attribute
from tandem.observability import metric_buckets as limits
from tandem.observability.controller_rows import CONTROLLER_ROWS
from tandem.observability.metric_types import EVERY, Attribute, Metric
from tandem.observability.metric_types import Emitter as Emitter
from tandem.observability.metric_types import Kind as Kind

KNOWN_SERIES_MAX = 32
"""A counter with at most so many series exports all of them from the start, as 0: `rate()` needs a first sample."""


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
        *attribute.OF_REQUEST,
        attribute.ERROR_TYPE,
        buckets=limits.REQUEST_S,
    ),
    _frontend(
        "gen_ai.server.time_to_first_token",
        Kind.HISTOGRAM,
        "s",
        "Time from the arrival of a request to its first token, including queue wait; finished requests only.",
        *attribute.OF_GENERATION,
        buckets=limits.FIRST_TOKEN_S,
    ),
    _frontend(
        "gen_ai.server.time_per_output_token",
        Kind.HISTOGRAM,
        "s",
        "Average time per output token after the first; finished requests only.",
        *attribute.OF_GENERATION,
        buckets=limits.TOKEN_S,
    ),
    _frontend(
        "gen_ai.client.token.usage",
        Kind.HISTOGRAM,
        "{token}",
        "Tokens per finished request. The conventions define only this name, for clients and servers.",
        *attribute.OF_REQUEST,
        attribute.TOKEN_TYPE,
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
        attribute.MODEL,
    ),
    _frontend("tandem.requests.admitted", Kind.COUNTER, "{request}", "Requests admitted by the frontend."),
    _frontend(
        "tandem.requests.refused",
        Kind.COUNTER,
        "{request}",
        "Requests rejected before any leg was dispatched, or by an engine because the request itself is wrong.",
        attribute.REASON,
    ),
    _frontend(
        "tandem.queue.depth",
        Kind.GAUGE,
        "{request}",
        "Requests in the queue of a model, waiting for capacity of its workers.",
        attribute.MODEL,
    ),
    _frontend(
        "tandem.models",
        Kind.GAUGE,
        "{model}",
        "Models of live workers, `served` or `refused`; the list of models says why.",
        attribute.MODEL_STATE,
    ),
    _frontend(
        "tandem.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "Time in the queue of a model; admitted requests only.",
        attribute.MODEL,
        buckets=limits.WAIT_S,
    ),
    _frontend(
        "tandem.pairs.chosen",
        Kind.COUNTER,
        "{attempt}",
        "Dispatched attempts, by routing policy and kind of route.",
        attribute.POLICY,
        attribute.ROUTE,
    ),
    _frontend(
        "tandem.placements",
        Kind.COUNTER,
        "{attempt}",
        "Dispatched attempts for which both pairs and aggregated workers could be used, by the reason of the choice.",
        attribute.PLACEMENT,
    ),
    _frontend(
        "tandem.route.choices",
        Kind.COUNTER,
        "{worker}",
        "Workers picked for dispatched attempts, by routing policy and role.",
        attribute.POLICY,
        attribute.ROLE,
    ),
    _frontend(
        "tandem.route.expected_cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens that the routing policy expected in the prefix cache of the worker it picked, where it knew and "
        "the leg finished. Compare with `tandem.route.cached_tokens`.",
        attribute.POLICY,
    ),
    _frontend(
        "tandem.route.cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens of finished legs that were in the prefix cache of the worker that computed the prompt.",
        attribute.POLICY,
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
        attribute.LEG,
        attribute.PHASE,
        attribute.REASON,
    ),
    _frontend(
        "tandem.continuations",
        Kind.COUNTER,
        "{attempt}",
        "Attempts that continued a stream after its first token, by outcome.",
        attribute.ATTEMPT_OUTCOME,
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
        attribute.PREFIX_STATE,
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
        attribute.SUSPICION,
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
        attribute.TENANT,
        attribute.CALL_OUTCOME,
    ),
    _frontend(
        "tandem.tenant.tokens",
        Kind.COUNTER,
        "{token}",
        "Tokens of these calls, as in their usage: a prompt counts once for all choices, and `cached` is a part of "
        "`prompt`. Those of failed and cancelled calls count from the dispatch on.",
        attribute.TENANT,
        attribute.TOKENS_KIND,
    ),
    _frontend(
        "tandem.tenant.refused",
        Kind.COUNTER,
        "{call}",
        "Calls that the tenant's quota refused, by the limit that was reached.",
        attribute.TENANT,
        attribute.QUOTA_LIMIT,
    ),
    _frontend("tandem.batch.open", Kind.GAUGE, "{batch}", "Batches that the process runs; only one process does."),
    _frontend("tandem.batch.rows.running", Kind.GAUGE, "{row}", "Rows of batches that run."),
    _frontend(
        "tandem.batch.rows",
        *(Kind.COUNTER, "{row}"),
        "Runs of batch rows: `stopped` made room for live requests, `repeated` is tried again after a failure.",
        attribute.BATCH_OUTCOME,
    ),
    _worker("tandem.legs.open", Kind.GAUGE, "{leg}", "Legs in progress on the worker."),
    _worker(
        "tandem.leg.duration",
        Kind.HISTOGRAM,
        "s",
        "Time from the acceptance of a leg to its end. `cancelled`: its frontend closed the call.",
        attribute.LEG,
        attribute.LEG_OUTCOME,
        buckets=limits.REQUEST_S,
    ),
    _worker(
        "tandem.leg.abort.duration",
        Kind.HISTOGRAM,
        "s",
        "Time from the cancellation of a leg by its frontend until the engine has released it.",
        attribute.LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.engine.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "Time from the engine's acceptance of a request to the start of its prefill, as reported by the engine.",
        attribute.LEG,
        buckets=limits.WAIT_S,
    ),
    _worker(
        "tandem.prefill.duration",
        Kind.HISTOGRAM,
        "s",
        "Duration of the prefill forward passes, as reported by the engine.",
        attribute.LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bytes",
        Kind.COUNTER,
        "By",
        "KV bytes sent (prefill) or received (decode), as counted by the engine's transfer backend.",
        attribute.LEG,
    ),
    _worker(
        "tandem.kv.transfer.duration",
        Kind.HISTOGRAM,
        "s",
        "Duration of the KV transfer of a request, as reported by the engine; not reported by SGLang decode engines.",
        attribute.LEG,
        buckets=limits.SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bandwidth",
        Kind.HISTOGRAM,
        "By/s",
        "KV transfer bytes per second of each request.",
        attribute.LEG,
        buckets=limits.BANDWIDTH,
    ),
    _worker(
        "tandem.kv.handovers",
        Kind.COUNTER,
        "{handover}",
        "Hand-overs received, by check of their KV.",
        attribute.KV_CHECK,
    ),
    _worker("tandem.prompt.tokens", Kind.COUNTER, "{token}", "Prompt tokens of finished legs.", attribute.LEG),
    _worker(
        "tandem.prompt.cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Prompt tokens of finished legs found in the engine's prefix cache, as reported by the engine.",
        attribute.LEG,
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
        attribute.ENGINE_STATE,
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
        attribute.PAGE_STATE,
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
        attribute.ROLE,
        attribute.ROLE_CHANGE_OUTCOME,
        buckets=limits.REQUEST_S,
    ),
    _worker(
        "tandem.engine.messages.dropped",
        Kind.COUNTER,
        "{message}",
        "Messages and requests that the engine's ports for the KV hand-over dropped because no engine had sent them, "
        "or they could not be read.",
        attribute.DROP_REASON,
    ),
    _registry(
        "tandem.members",
        Kind.GAUGE,
        "{member}",
        "Members of the view, by role and state; 0 for a role without members.",
        attribute.MEMBER_ROLE,
        attribute.MEMBER_STATE,
    ),
    _registry("tandem.watchers", Kind.GAUGE, "{watcher}", "Watch streams of frontends and edges on this registry."),
    _registry(
        "tandem.lease.age",
        Kind.GAUGE,
        "s",
        "Time since the last keepalive of each worker whose lease this registry holds.",
        attribute.WORKER_ID,
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
        attribute.PROCESS_STATE,
    ),
    _parent("tandem.process.restarts", Kind.COUNTER, "{restart}", "Restarts of processes of this frontend."),
    *CONTROLLER_ROWS,
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
    """The attributes, with `metric_attributes.OTHER` for each value that is not in the catalog."""
    known = {each.name: each.values for each in metric.attributes}
    assert attributes.keys() <= known.keys(), f"{metric.name} has no attribute {attributes.keys() - known.keys()}"
    return {
        name: value if not known[name] or value in known[name] else attribute.OTHER
        for name, value in attributes.items()
    }


def combinations(metric: Metric) -> list[dict[str, str]]:
    """Attributes of all series of a metric; empty when they are unknown or more than `KNOWN_SERIES_MAX`."""
    names = [each.name for each in metric.attributes]
    values = [each.values for each in metric.attributes]
    if math.prod(map(len, values)) > KNOWN_SERIES_MAX:
        return []
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
