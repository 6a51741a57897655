"""The one table of metrics: name, kind, unit, meaning, who emits it, and every attribute with all values it can have.

Pure, and without OpenTelemetry: what is not switched on is not imported. docs/reference/metrics.md is generated from
here, the instruments are made from here (`otel_metrics.py`), and a test makes each row move. Spans are named in
`span_names.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from tandem.domain.request_state import LegRole, Phase
from tandem.domain.worker import WorkerRole, WorkerState
from tandem.errors import StartError, TandemError

OTHER = "other"
"""Stands for every value that is not in the table: a surprise must not become a new series."""
KNOWN_SERIES_MAX = 32
"""A counter of no more series than this shows all of them from the start, as 0."""
WORKERS_MAX = 64
"""Worker ids that one process tells apart in its metrics; the rest are `OTHER` together."""


class Kind(Enum):
    """How a metric moves."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


class Emitter(Enum):
    """Which processes have it."""

    FRONTEND = "frontend"
    WORKER = "worker"
    REGISTRY = "registry"
    EDGE = "edge"
    PARENT = "parent"
    """Of a frontend's processes, where it has several."""


EVERY = tuple(Emitter)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute, with everything that bounds its values."""

    name: str
    values: tuple[str, ...] = ()
    """All of them, but for `OTHER`; empty: `bound` says why there are few."""
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row."""

    name: str
    kind: Kind
    unit: str
    """In UCUM, as OpenTelemetry has it; what is in braces is a word for people."""
    meaning: str
    emitters: tuple[Emitter, ...]
    attributes: tuple[Attribute, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


def _reasons() -> Iterator[str]:
    """Reasons of all errors that can travel."""

    def below(error: type[TandemError]) -> Iterator[type[TandemError]]:
        yield error
        for child in error.__subclasses__():
            yield from below(child)

    for error in below(TandemError):
        if not issubclass(error, StartError):
            yield error.reason


CANCELLED = "CANCELLED"
"""In place of a reason: the client left."""
REASONS = tuple(sorted(set(_reasons())))
ROLES = tuple(role.value for role in WorkerRole)

OPERATION = Attribute("gen_ai.operation.name", ("chat", "text_completion", "generate"))
PROVIDER = Attribute("gen_ai.provider.name", ("tandem",))
MODEL = Attribute("gen_ai.request.model", bound="the one model that the frontend serves")
ERROR_TYPE = Attribute("error.type", (*REASONS, CANCELLED))
TOKEN_TYPE = Attribute("gen_ai.token.type", ("input", "output"))

REASON = Attribute("tandem.reason", REASONS)
LEG = Attribute("tandem.leg", tuple(role.value for role in LegRole))
PHASE = Attribute("tandem.phase", tuple(phase.value for phase in Phase))
POLICY = Attribute("tandem.policy", ("random",))
ROUTE = Attribute("tandem.route", ("pair", "aggregated"))
LEG_OUTCOME = Attribute("tandem.outcome", ("finished", "aborted", "failed", "cancelled"))
ATTEMPT_OUTCOME = Attribute("tandem.outcome", ("finished", "broken", "ended"))
ENGINE_STATE = Attribute("tandem.state", ("running", "waiting", "transferring"))
PAGE_STATE = Attribute("tandem.state", ("used", "cached", "free"))
PROCESS_STATE = Attribute("tandem.state", ("starting", "open", "serving", "draining", "ended", "silent"))
MEMBER_STATE = Attribute("tandem.state", tuple(state.value for state in WorkerState))
MEMBER_ROLE = Attribute("tandem.role", (*ROLES, "frontend"))
WORKER_ID = Attribute("tandem.worker.id", bound=f"{WORKERS_MAX} ids; the rest share `{OTHER}`, with the greatest value")

OF_REQUEST = (OPERATION, PROVIDER, MODEL)

REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(float(4**power) for power in range(14))
"""These four as the GenAI conventions advise."""
SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BANDWIDTH = tuple(float(10**power * factor) for power in range(5, 12) for factor in (1, 3))
"""From 100 kB to 300 GB a second."""


def _rows(emitter: Emitter) -> Callable[..., Metric]:
    """Makes rows of one emitter."""

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
        "From the request's coming to its end, whatever that is; `error.type` says how it failed.",
        *OF_REQUEST,
        ERROR_TYPE,
        buckets=REQUEST_S,
    ),
    _frontend(
        "gen_ai.server.time_to_first_token",
        Kind.HISTOGRAM,
        "s",
        "From the request's coming to its first token, waiting in line included; of requests that finished.",
        *OF_REQUEST,
        buckets=FIRST_TOKEN_S,
    ),
    _frontend(
        "gen_ai.server.time_per_output_token",
        Kind.HISTOGRAM,
        "s",
        "From the first token to the last one, for each token after the first; of requests that finished.",
        *OF_REQUEST,
        buckets=TOKEN_S,
    ),
    _frontend(
        "gen_ai.client.token.usage",
        Kind.HISTOGRAM,
        "{token}",
        "Tokens of a request that finished. The conventions have this name only, for clients and servers.",
        *OF_REQUEST,
        TOKEN_TYPE,
        buckets=TOKENS,
    ),
    _frontend("tandem.connections.open", Kind.GAUGE, "{connection}", "Connections of clients, edges and probes."),
    _frontend("tandem.requests.open", Kind.GAUGE, "{request}", "Requests that have not ended, those in line included."),
    _frontend("tandem.requests.admitted", Kind.COUNTER, "{request}", "Requests that got a place with the workers."),
    _frontend(
        "tandem.requests.refused",
        Kind.COUNTER,
        "{request}",
        "Requests that ended with an error before any leg was sent.",
        REASON,
    ),
    _frontend("tandem.queue.depth", Kind.GAUGE, "{request}", "Requests that wait in line for room with the workers."),
    _frontend(
        "tandem.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "Time in that line, of requests that got a place.",
        buckets=WAIT_S,
    ),
    _frontend(
        "tandem.pairs.chosen",
        Kind.COUNTER,
        "{attempt}",
        "Attempts that were sent: by which policy their workers were chosen, and whether these are a pair.",
        POLICY,
        ROUTE,
    ),
    _frontend(
        "tandem.leg.failures",
        Kind.COUNTER,
        "{leg}",
        "Legs that broke an attempt: which leg, in which phase, and the reason.",
        LEG,
        PHASE,
        REASON,
    ),
    _frontend(
        "tandem.continuations",
        Kind.COUNTER,
        "{attempt}",
        "Attempts that went on with a stream whose client had tokens already, by how they ended.",
        ATTEMPT_OUTCOME,
    ),
    _frontend(
        "tandem.cancel.latency",
        Kind.HISTOGRAM,
        "s",
        "From a client's leaving to the end of both its legs here: their calls are over, and their engines told.",
        buckets=SHORT_S,
    ),
    _worker("tandem.legs.open", Kind.GAUGE, "{leg}", "Legs that the worker's service holds open."),
    _worker(
        "tandem.leg.duration",
        Kind.HISTOGRAM,
        "s",
        "From the worker's taking of a leg to its end. `cancelled`: its frontend ended the call.",
        LEG,
        LEG_OUTCOME,
        buckets=REQUEST_S,
    ),
    _worker(
        "tandem.leg.abort.duration",
        Kind.HISTOGRAM,
        "s",
        "From the moment a frontend ends the call of a leg to the moment its engine has let go of it.",
        LEG,
        buckets=SHORT_S,
    ),
    _worker(
        "tandem.engine.queue.wait",
        Kind.HISTOGRAM,
        "s",
        "From the engine's taking of a request to the beginning of its prefill, as the engine tells it.",
        LEG,
        buckets=WAIT_S,
    ),
    _worker(
        "tandem.prefill.duration",
        Kind.HISTOGRAM,
        "s",
        "Time in which the prompt ran through the model, as the engine tells it.",
        LEG,
        buckets=SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bytes",
        Kind.COUNTER,
        "By",
        "KV that has moved: sent (prefill) or received (decode), as the engine's transport counts it.",
        LEG,
    ),
    _worker(
        "tandem.kv.transfer.duration",
        Kind.HISTOGRAM,
        "s",
        "From the first byte of a request's KV to the last one, as the engine tells it; SGLang's decode does not.",
        LEG,
        buckets=SHORT_S,
    ),
    _worker(
        "tandem.kv.transfer.bandwidth",
        Kind.HISTOGRAM,
        "By/s",
        "Those bytes over that time, for each request.",
        LEG,
        buckets=BANDWIDTH,
    ),
    _worker("tandem.prompt.tokens", Kind.COUNTER, "{token}", "Prompt tokens of legs that finished.", LEG),
    _worker(
        "tandem.prompt.cached_tokens",
        Kind.COUNTER,
        "{token}",
        "Those of them whose KV was in this engine's prefix cache, as the engine tells it.",
        LEG,
    ),
    _worker(
        "tandem.cache.hit_ratio",
        Kind.GAUGE,
        "1",
        "Cached over all prompt tokens of the last 256 legs that finished.",
    ),
    _worker(
        "tandem.engine.requests",
        Kind.GAUGE,
        "{request}",
        "Requests in the engine, by what they do: `transferring` waits for the other leg's KV, or for its taking.",
        ENGINE_STATE,
    ),
    _worker(
        "tandem.kv.pages",
        Kind.GAUGE,
        "{page}",
        "Pages of KV memory: `used` by requests, `cached` for nobody, `free`. Where the engine does not tell cached "
        "pages apart, they are among the free ones.",
        PAGE_STATE,
    ),
    _worker("tandem.kv.pages.capacity", Kind.GAUGE, "{page}", "Pages of KV memory that the engine has."),
    _worker(
        "tandem.engine.healthy",
        Kind.GAUGE,
        "1",
        "1 while the engine proves itself by tokens or a canary, 0 while it does not, and health is NOT_SERVING.",
    ),
    _registry(
        "tandem.members",
        Kind.GAUGE,
        "{member}",
        "Members of the view, by role and state. A role without members is told as 0.",
        MEMBER_ROLE,
        MEMBER_STATE,
    ),
    _registry("tandem.watchers", Kind.GAUGE, "{watcher}", "Frontends and edges that follow this registry now."),
    _registry(
        "tandem.lease.age",
        Kind.GAUGE,
        "s",
        "Time since the last sign of life of each worker whose lease this registry keeps.",
        WORKER_ID,
    ),
    _registry("tandem.lease.ttl", Kind.GAUGE, "s", "Age at which a lease is over."),
    _registry(
        "tandem.view.live",
        Kind.GAUGE,
        "1",
        "1 while the view comes from where membership is kept, 0 while it is the last known one: Consul is away.",
    ),
    _registry(
        "tandem.consul.answer.age",
        Kind.GAUGE,
        "s",
        "Time since Consul's last answer; with the consul backend only.",
    ),
    _registry(
        "tandem.consul.index_lag",
        Kind.GAUGE,
        "{index}",
        "By how much the view that is told is behind Consul's last answer; with the consul backend only.",
    ),
    _parent(
        "tandem.processes",
        Kind.GAUGE,
        "{process}",
        "Processes of this frontend by state; `open` answers but does not serve yet, `silent` does not answer.",
        PROCESS_STATE,
    ),
    _parent(
        "tandem.process.restarts",
        Kind.COUNTER,
        "{restart}",
        "Processes of this frontend that have ended and were started again.",
    ),
    Metric(
        "tandem.drains",
        Kind.COUNTER,
        "{drain}",
        "Drains that this process has begun.",
        EVERY,
    ),
    Metric(
        "tandem.event_loop.lag",
        Kind.HISTOGRAM,
        "s",
        "By how much a timer of the event loop came too late, four times a second.",
        EVERY,
        buckets=SHORT_S,
    ),
)

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in TABLE}

_UNITS = {"s": "seconds", "By": "bytes", "By/s": "bytes_per_second"}


def prometheus_name(metric: Metric) -> str:
    """Its name where Prometheus scrapes it; a histogram's series end in `_bucket`, `_sum` and `_count` besides."""
    name = metric.name.replace(".", "_")
    unit = _UNITS.get(metric.unit, "")
    if unit and not name.endswith(unit):
        name = f"{name}_{unit}"
    return f"{name}_total" if metric.kind is Kind.COUNTER else name


def bounded(metric: Metric, attributes: Mapping[str, str]) -> dict[str, str]:
    """The attributes, with `OTHER` for each value that is not in the table."""
    known = {attribute.name: attribute.values for attribute in metric.attributes}
    assert attributes.keys() <= known.keys(), f"{metric.name} has no attribute {attributes.keys() - known.keys()}"
    return {name: value if not known[name] or value in known[name] else OTHER for name, value in attributes.items()}


def combinations(metric: Metric) -> list[dict[str, str]]:
    """All its series, where they are known and few; else none."""
    names = [attribute.name for attribute in metric.attributes]
    values = [attribute.values for attribute in metric.attributes]
    if math.prod(map(len, values)) > KNOWN_SERIES_MAX:
        return []
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]
