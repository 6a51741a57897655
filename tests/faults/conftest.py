"""Prints what the scenarios came to, at the end of a run of this directory."""

from __future__ import annotations

from typing import Any

from tests.faults.support import leg_report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if leg_report.LINES:
        terminalreporter.section("faults")
        terminalreporter.write_line(leg_report.HEAD)
        for line in leg_report.LINES:
            terminalreporter.write_line(line)
        terminalreporter.write_line(leg_report.total())
