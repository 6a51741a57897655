"""Files of a killed process are removed by the next one, also those outside of its directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.service import run_directory
from tandem.service.owned_directory import OwnedDirectory, sweep

KILLED = """
import os, signal, sys
from pathlib import Path
from tandem.service.owned_directory import OwnedDirectory
directory, outside = OwnedDirectory("t-"), Path(sys.argv[1])
directory.note_outside(outside)
outside.write_bytes(b"KV")
print(directory.path, flush=True)
if len(sys.argv) > 2:
    sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv(run_directory.VARIABLE, str(run))
    return run


def killed(outside: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", KILLED, str(outside)], capture_output=True, text=True, check=False)
    assert done.returncode < 0, done.stderr
    return Path(done.stdout.strip())


def test_the_next_process_removes_what_a_killed_one_left(parent: Path, tmp_path: Path) -> None:
    outside = tmp_path / "shared-memory"
    left = killed(outside)
    assert outside.exists()
    assert left.is_dir()
    own = OwnedDirectory("t-")
    assert not outside.exists()
    assert [path.name for path in parent.iterdir()] == [own.path.name]
    own.remove()
    own.remove()
    assert not list(parent.iterdir())


def test_the_parent_removes_what_a_killed_process_left(parent: Path, tmp_path: Path) -> None:
    outside = tmp_path / "shared-memory"
    killed(outside)
    sweep(parent)
    assert not outside.exists()
    assert not list(parent.iterdir())


def test_a_living_process_keeps_its_files(parent: Path, tmp_path: Path) -> None:
    outside = tmp_path / "shared-memory"
    command = [sys.executable, "-c", KILLED, str(outside), "waits"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        directory = Path(living.stdout.readline().strip())
        OwnedDirectory("t-").remove()
        assert outside.exists()
        assert directory.is_dir()
        living.communicate("")
    sweep(parent)
    assert not outside.exists()


def test_its_own_remove_takes_the_listed_files_along(parent: Path, tmp_path: Path) -> None:
    own, outside = OwnedDirectory("t-"), tmp_path / "shared-memory"
    own.note_outside(outside)
    own.note_outside(tmp_path / "never-made")
    outside.write_bytes(b"KV")
    own.remove()
    assert not outside.exists()
