"""Progress display of starting and stopping processes, with and without a terminal."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from rich.console import Console

from tandem.cli import progress
from tandem.cli.progress import Readiness
from tandem.local_cluster.child_process import ClusterProcess, ProcessState


def shown(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=80), text


@pytest.mark.parametrize("terminal", [False, True])
async def test_a_draining_process_is_shown_as_draining(tmp_path: Path, terminal: bool) -> None:
    console, text = shown(terminal)
    with Readiness(console) as readiness:
        for state in (ProcessState.DRAINING, ProcessState.ENDED):
            process = ClusterProcess("decode-0", "decode", {}, tmp_path)
            process.state = state
            readiness.changed(process)
            await asyncio.sleep(0.2)
    assert "draining" in text.getvalue()
    assert "ended" in text.getvalue()
    assert "ready" not in text.getvalue()
    assert "-0.0" not in text.getvalue()


async def test_a_long_wait_prints_a_reminder_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REMIND_INTERVAL_S", 0.02)
    console, text = shown(terminal=False)
    with Readiness(console) as readiness:
        slow, done = (ClusterProcess(name, "decode", {}, tmp_path) for name in ("decode-0", "decode-1"))
        done.state = ProcessState.ENDED
        readiness.changed(slow)
        readiness.changed(done)
        await asyncio.sleep(0.2)
    assert text.getvalue().count("decode-0       still starting after 0 s") >= 2
    assert "decode-1       still" not in text.getvalue()
