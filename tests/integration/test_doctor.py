"""`tandem doctor` on this machine, and with programs on PATH that a test has written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SLOW = ("torch", "sglang", "transformers", "grpc", "envoy")


def doctor(*arguments: str, path: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the command."""
    environment = {**os.environ, **({} if path is None else {"PATH": str(path)})}
    ended = subprocess.run(
        [sys.executable, "-m", "tandem.cli", "doctor", "--json", *arguments],
        capture_output=True, text=True, check=False, timeout=100, env=environment,
    )  # fmt: skip
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)["parts"]


def program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt")
def test_the_environment_of_the_tests_is_ready_for_the_cpu_and_the_edge() -> None:
    ended, parts = doctor("cpu", "edge")
    assert [(part, one) for part in parts for one in parts[part]["findings"] if one["state"] != "ok"] == []
    assert ended == 0


def test_nothing_slow_is_imported() -> None:
    watch = (
        "import runpy, sys\n"
        "sys.argv = ['tandem', 'doctor']\n"
        "try:\n    runpy.run_module('tandem.cli', run_name='__main__')\n"
        f"finally:\n    print('imported', [name for name in {SLOW} if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True, timeout=100)
    assert shown.stdout.splitlines()[-1] == "imported []"


def test_programs_on_path_are_run_and_their_answers_reported(tmp_path: Path) -> None:
    program(tmp_path, "docker", 'case "$*" in *Server*) echo "permission denied" >&2; exit 1;; *) echo v2.1.0;; esac')
    program(tmp_path, "consul", "echo Consul v1.22.1")
    ended, parts = doctor("containers", "consul", path=tmp_path)
    assert ended == 1
    assert parts["consul"]["ready"]
    assert parts["consul"]["findings"][0]["found"] == f"1.22.1 ({tmp_path / 'consul'})"
    states = {one["name"]: one["state"] for one in parts["containers"]["findings"]}
    assert states == {"docker": "ok", "compose": "ok", "engine": "missing"}
    assert "usermod" in parts["containers"]["findings"][-1]["mend"]


def test_an_empty_path_lacks_programs(tmp_path: Path) -> None:
    ended, parts = doctor("containers", path=tmp_path)
    assert ended == 1
    assert [one["state"] for one in parts["containers"]["findings"]] == ["missing"]
