"""Which files a test process runs, and in which order: files that share engines in one process, the slowest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadFileScheduling

CONTRACT = "tests/contract"
OPENAI = "tests/integration OpenAI pair"
UNITS = {
    "tests/integration/test_openai_clients.py": OPENAI,
    "tests/integration/test_openai_fields.py": OPENAI,
}
"""Files that share a pair of real engines, which takes longer to start than their tests to run."""
SLOWEST = (
    "tests/integration/test_sglang_cluster.py",
    "tests/integration/test_frontend_siblings.py",
    CONTRACT,
    "tests/integration/test_frontend_process_endings.py",
    "tests/faults/test_leg_on_sglang.py",
    "tests/integration/test_cluster_metrics.py",
    OPENAI,
    "tests/faults/test_leg_simulation.py",
    "tests/faults/test_leg_cancels_on_sglang.py",
    "tests/integration/test_edge_discovery.py",
    "tests/integration/test_openai_tools.py",
    "tests/integration/test_parser_host.py",
    "tests/integration/test_prometheus.py",
    "tests/integration/test_command_line.py",
    "tests/integration/test_tls_cluster.py",
    "tests/integration/test_traces.py",
    "tests/integration/test_command_line_endings.py",
)
"""Begun in this order: a long file that begins last ends alone. Between two that compute comes one that waits."""


class SharedEngines(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """A process gets all files of a unit: what they share is started once."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """The unit of a test: its file, unless that shares engines with others."""
    file = nodeid.split("::", 1)[0]
    return CONTRACT if file.startswith(f"{CONTRACT}/") else UNITS.get(file, file)


def order(items: list[pytest.Item], slowest: Sequence[str] = SLOWEST) -> None:
    """Sort tests by their units: the slowest, then those with most tests. Within a unit their order stays."""
    counts = Counter(unit_of(item.nodeid) for item in items)
    ranks = {unit: rank for rank, unit in enumerate(slowest)}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        unit = unit_of(item.nodeid)
        return ranks.get(unit, len(ranks)), -counts[unit], unit

    items.sort(key=place)
