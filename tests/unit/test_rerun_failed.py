"""The second run of what failed in the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.markdown import ROOT
from tools.rerun_failed import ENDED, FILES_MAX, LAST_FAILED, SOME_FAILED


def rerun(directory: Path, *failed: str, ended: str | None = SOME_FAILED) -> subprocess.CompletedProcess[str]:
    """The tool's run in a directory in which these tests failed before."""
    record = directory / LAST_FAILED
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(dict.fromkeys(failed, True)))
    if ended is not None:
        (directory / ENDED).parent.mkdir(parents=True)
        (directory / ENDED).write_text(ended)
    command = [sys.executable, str(ROOT / "tools" / "rerun_failed.py")]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("assertion", "status"), [("True", 0), ("False", 1)])
def test_a_file_with_a_failed_test_runs_again_and_decides(tmp_path: Path, assertion: str, status: int) -> None:
    (tmp_path / "test_a.py").write_text(f"def test_one():\n    assert {assertion}\n\ndef test_two():\n    pass\n")
    (tmp_path / "test_b.py").write_text("def test_other():\n    raise AssertionError\n")
    done = rerun(tmp_path, "test_a.py::test_one")
    assert done.returncode == status, done.stdout + done.stderr
    assert "test_a.py::test_one" in done.stdout, "the first run's failure is shown"
    assert "test_b.py" not in done.stdout


def test_a_run_with_failures_in_many_files_is_not_repeated(tmp_path: Path) -> None:
    done = rerun(tmp_path, *(f"test_{number}.py::test_one" for number in range(FILES_MAX + 1)))
    assert done.returncode == 1
    assert "test session starts" not in done.stdout


def test_a_run_that_ended_without_a_failed_test_is_not_repeated(tmp_path: Path) -> None:
    assert rerun(tmp_path).returncode == 1


@pytest.mark.parametrize("ended", ["2", "3", None], ids=["interrupted", "broken", "killed"])
def test_a_run_that_did_not_run_every_test_is_not_repeated(tmp_path: Path, ended: str | None) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    pass\n")
    assert rerun(tmp_path, "test_a.py::test_one", ended=ended).returncode == 1
