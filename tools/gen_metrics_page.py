"""Writes the tables of docs/reference/metrics.md from src/tandem/observability/metric_catalog.py.

The text above the tables is written by hand.

--check writes nothing and fails when the page differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "src"))

from tandem.observability.metric_attributes import OTHER
from tandem.observability.metric_catalog import TABLE
from tandem.observability.metric_types import EVERY, Attribute, Emitter, Metric, prometheus_name
from tools.markdown import ROOT, write_or_check

PAGE = ROOT / "docs" / "reference" / "metrics.md"
MARK = "## The table\n"
TITLES = {
    (Emitter.FRONTEND,): "Frontends: requests",
    (Emitter.WORKER,): "Workers: legs, engines, KV",
    (Emitter.REGISTRY,): "Registries: members, leases, Consul",
    (Emitter.PARENT,): "Frontends of several processes",
    EVERY: "Every process",
}
VALUES_SHOWN = 8


def page() -> str:
    parts = [PAGE.read_text().partition(MARK)[0] + MARK]
    for emitters, title in TITLES.items():
        parts += [f"### {title}", "", *_rows([metric for metric in TABLE if metric.emitters == emitters]), ""]
    parts += ["### Values of attributes", "", *_attributes()]
    return "\n".join(parts).rstrip() + "\n"


def _rows(metrics: list[Metric]) -> Iterator[str]:
    yield "| metric | in Prometheus | kind | unit | attributes | meaning |"
    yield "|---|---|---|---|---|---|"
    for metric in metrics:
        attributes = ", ".join(f"`{attribute.name}`" for attribute in metric.attributes)
        name = prometheus_name(metric)
        yield (
            f"| `{metric.name}` | `{name}` | {metric.kind.value} | `{metric.unit}` | {attributes} | {metric.meaning} |"
        )


def _attributes() -> Iterator[str]:
    yield "| attribute | of | values |"
    yield "|---|---|---|"
    found: dict[Attribute, list[str]] = {}
    for metric in TABLE:
        for attribute in metric.attributes:
            found.setdefault(attribute, []).append(f"`{metric.name}`")
    for attribute, names in found.items():
        of = ", ".join(names) if len(names) < VALUES_SHOWN else f"{names[0]} and {len(names) - 1} more"
        values = attribute.bound or ", ".join(f"`{value}`" for value in attribute.values)
        yield f"| `{attribute.name}` | {of} | {values} |"
    yield ""
    yield f"Any other value is reported as `{OTHER}`."


def main() -> int:
    return write_or_check(PAGE, page(), "the table of metrics", Path(__file__).name)


if __name__ == "__main__":
    sys.exit(main())
