"""The order of the test files over several test processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.scheduling import CONTRACT, ENGINES, MORE_ENGINES, SLOWEST, UNITS, order, unit_of

ROOT = Path(__file__).parents[2]


def test_the_files_that_are_ordered_exist() -> None:
    files = [*UNITS, *(unit for unit in SLOWEST if unit not in (ENGINES, MORE_ENGINES))]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_slowest_begin_and_tests_of_a_unit_keep_their_order() -> None:
    names = ["a.py::1", "b.py::1", f"{CONTRACT}/b.py::1", "b.py::2", "slow.py::1", f"{CONTRACT}/a.py::1"]
    items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
    order(items, slowest=("slow.py", MORE_ENGINES))
    placed = [item.nodeid for item in items]
    assert placed == ["slow.py::1", f"{CONTRACT}/b.py::1", f"{CONTRACT}/a.py::1", "b.py::1", "b.py::2", "a.py::1"]
    assert unit_of("tests/unit/test_words.py::test_a") == "tests/unit/test_words.py"
