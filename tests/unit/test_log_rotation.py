"""Log files of a local cluster are bounded while their writers keep them open."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from tandem.local_cluster import log_rotation
from tandem.testing.eventually import assert_eventually


class Logged:
    def __init__(self, log: Path) -> None:
        self.log = log
        self.emptied_count = 0

    def log_emptied(self) -> None:
        self.emptied_count += 1


def test_a_long_log_moves_and_its_writer_continues_in_the_emptied_file(tmp_path: Path) -> None:
    log = tmp_path / "edge.log"
    # As a child gets it: opened by the parent, and kept.
    writer = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(writer, b"a" * 11)
    assert log_rotation.rotate(log, 10)
    os.write(writer, b"bb")
    assert log.read_bytes() == b"bb"
    assert (tmp_path / "edge.log.1").read_bytes() == b"a" * 11
    os.write(writer, b"c" * 9)
    assert log_rotation.rotate(log, 10)
    assert (tmp_path / "edge.log.1").read_bytes() == b"bb" + b"c" * 9, "the former copy is replaced"
    os.close(writer)


def test_a_short_or_missing_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "edge.log"
    assert not log_rotation.rotate(log, 10)
    log.write_bytes(b"a" * 10)
    assert not log_rotation.rotate(log, 10)
    assert not (tmp_path / "edge.log.1").exists()


async def test_processes_learn_that_their_log_was_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Logged(tmp_path / "edge.log")
    process.log.write_bytes(b"a")
    monkeypatch.setattr(log_rotation.rotate, "__defaults__", (0,))
    keeping = asyncio.create_task(log_rotation.keep_bounded([process], interval_s=0.01))
    await assert_eventually(lambda: process.emptied_count == 1)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
