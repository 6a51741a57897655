"""Start of a process: an announce file that cannot be written, and objects frozen for the garbage collector."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.service import process
from tandem.service.process import announce


def test_an_announcement_is_whole(tmp_path: Path) -> None:
    announce(tmp_path / "here.json", "127.0.0.1:7400", 9400)
    assert json.loads((tmp_path / "here.json").read_text()) == {
        "address": "127.0.0.1:7400",
        "pid": os.getpid(),
        "metrics_port": 9400,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["here.json"]


@pytest.mark.parametrize("file", ["missing/here.json", "directory", "."])
def test_an_announcement_that_cannot_be_written_names_its_key(tmp_path: Path, file: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError) as refused:
        announce(tmp_path / file if file != "." else Path("."), "127.0.0.1:7400")
    assert refused.value.key == "announce_file"


def test_children_of_a_thread_that_ends_meanwhile_are_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "children"
    there = tmp_path / "there"
    there.write_text("7 8 ")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone, there]))
    assert process._children() == [7, 8]


SERVING = """
import asyncio, gc
from tandem.service.process import serve

class Idle:
    address, metrics_port = "127.0.0.1:1", 0
    async def __aenter__(self):
        self.before = gc.get_freeze_count()
        return self
    async def __aexit__(self, *exception): pass
    async def wait_finished(self): self.serving = gc.get_freeze_count()
    async def drain(self): return True

asyncio.run(serve(service := Idle()))
print(service.before, service.serving)
"""


def test_serve_after_the_start_keeps_what_exists_from_the_garbage_collector() -> None:
    done = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True, check=True)
    before, serving = map(int, done.stdout.split())
    assert before == 0
    assert serving > 10_000
