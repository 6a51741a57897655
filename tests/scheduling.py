"""Which files a test process runs, and in which order: files that share engines in one process, the slowest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from xdist.scheduler import LoadFileScheduling

CONTRACT = "tests/contract"
ENGINES, MORE_ENGINES = "real engines", "more real engines"
UNITS = {
    **dict.fromkeys(
        (
            "tests/integration/test_openai_clients.py",
            "tests/integration/test_openai_fields.py",
            "tests/integration/test_sglang_cluster.py",
            "tests/integration/test_several_models_on_sglang.py",
            "tests/integration/test_foreign_messages.py",
            "tests/integration/test_long_queues.py",
            "tests/integration/test_openai_tools.py",
            "tests/integration/test_agent_doors.py",
            "tests/integration/test_cluster_metrics.py",
            "tests/integration/test_sglang_start.py",
            "tests/integration/test_tool_grammars.py",
        ),
        ENGINES,
    ),
    **dict.fromkeys(
        (
            "tests/faults/test_leg_on_sglang.py",
            "tests/faults/test_leg_cancels_on_sglang.py",
            "tests/faults/test_outages_on_sglang.py",
            "tests/integration/test_role_changes_on_sglang.py",
            "tests/integration/test_sglang_profile.py",
            "tests/integration/test_traces_on_sglang.py",
            "tests/integration/test_command_line_edge.py",
        ),
        MORE_ENGINES,
    ),
}
"""Files with real engines, in two units: of more than two pairs at a time each takes the others' processor time."""
SLOWEST = (
    ENGINES,
    MORE_ENGINES,
    "tests/integration/test_frontend_siblings.py",
    "tests/integration/test_frontend_process_endings.py",
    "tests/faults/test_leg_simulation.py",
    "tests/integration/test_edge_discovery.py",
    "tests/integration/test_parser_host.py",
    "tests/integration/test_agent_clients.py",
    "tests/integration/test_examples.py",
    "tests/integration/test_prometheus.py",
    "tests/integration/test_command_line.py",
    "tests/integration/test_tls_cluster.py",
    "tests/integration/test_traces.py",
    "tests/integration/test_command_line_endings.py",
)
"""Begun in this order: a long file that begins last ends alone."""


class SharedEngines(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """A process gets all files of a unit: what they share is started once."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)


def unit_of(nodeid: str) -> str:
    """The unit of a test: its file, unless that shares engines with others."""
    file = nodeid.split("::", 1)[0]
    return MORE_ENGINES if file.startswith(f"{CONTRACT}/") else UNITS.get(file, file)


def order(items: list[pytest.Item], slowest: Sequence[str] = SLOWEST) -> None:
    """Sort tests by their units: the slowest, then those with most tests. Within a unit their order stays."""
    counts = Counter(unit_of(item.nodeid) for item in items)
    ranks = {unit: rank for rank, unit in enumerate(slowest)}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        unit = unit_of(item.nodeid)
        return ranks.get(unit, len(ranks)), -counts[unit], unit

    items.sort(key=place)
