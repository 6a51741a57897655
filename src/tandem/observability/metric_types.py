"""What a row of the catalog of metrics consists of. The rows are `metric_catalog`'s."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kind of instrument."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


class Emitter(Enum):
    """Process that emits a metric."""

    FRONTEND = "frontend"
    WORKER = "worker"
    REGISTRY = "registry"
    EDGE = "edge"
    CONTROLLER = "controller"
    PARENT = "parent"
    """The parent process of a frontend with several processes."""


EVERY = tuple(Emitter)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute and what bounds its cardinality."""

    name: str
    values: tuple[str, ...] = ()
    """All values except `OTHER`; empty: `bound` states why they are few."""
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalog."""

    name: str
    kind: Kind
    unit: str
    """UCUM unit, as in OpenTelemetry; text in braces is an annotation."""
    meaning: str
    emitters: tuple[Emitter, ...]
    attributes: tuple[Attribute, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, in `unit`."""


_UNITS = {"s": "seconds", "By": "bytes", "By/s": "bytes_per_second"}


def prometheus_name(metric: Metric) -> str:
    """Name in Prometheus; a histogram's series have the suffixes `_bucket`, `_sum` and `_count` in addition."""
    name = metric.name.replace(".", "_")
    unit = _UNITS.get(metric.unit, "")
    if unit and not name.endswith(unit):
        name = f"{name}_{unit}"
    return f"{name}_total" if metric.kind is Kind.COUNTER else name
