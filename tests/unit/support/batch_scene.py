"""Batches on a directory of the test's own: an endpoint that follows a script, a clock that the test moves."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from google.api.httpbody_pb2 import HttpBody
from tandem_frontend.admission import background
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.batches import gate as gate_module
from tandem_frontend.batches import rows as rows_module
from tandem_frontend.batches import run as run_module
from tandem_frontend.batches import runner as runner_module
from tandem_frontend.batches.directory import BatchDirectory, new_id
from tandem_frontend.batches.files import FileStore
from tandem_frontend.batches.gate import RowGate
from tandem_frontend.batches.records import WINDOW_S, Batch, Status
from tandem_frontend.batches.run import RunDeps
from tandem_frontend.batches.runner import BatchRunner
from tandem_frontend.batches.store import BatchStore
from tandem_frontend.call_context import Caller

from tandem.clock import ManualClock, monotonic
from tandem.testing.eventually import assert_eventually

URL = "/v1/chat/completions"
NOW_S = 1_800_000_000.0
RETENTION_S = 30 * 86_400.0


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look more often than in production, so that no test waits for a tick."""
    for module, name in ((run_module, "POLL_S"), (runner_module, "SCAN_S"), (gate_module, "TICK_S")):
        monkeypatch.setattr(module, name, 0.005)
    monkeypatch.setattr(background, "QUIET_S", 0.05)
    monkeypatch.setattr(rows_module, "WAIT_S", 0.01)


class ReadClock(ManualClock):
    """Counts how often it was read."""

    def __init__(self) -> None:
        super().__init__(NOW_S)
        self.read_count = 0

    def __call__(self) -> float:
        self.read_count += 1
        return super().__call__()


def rows(*bodies: Any) -> bytes:
    """An input whose rows are named r0, r1, …"""
    lines = (
        {"custom_id": f"r{number}", "method": "POST", "url": URL, "body": body} for number, body in enumerate(bodies)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class ScriptedEndpoint:
    """Answers each body with itself, unless the test says otherwise."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        """Bodies, in the order in which they came."""
        self.callers: list[Caller] = []
        self.failures: dict[int, list[Exception]] = {}
        """By the body's `n`: what it fails with, one after the other."""
        self.held: Callable[[Any], bool] = lambda body: False
        """Bodies that are not answered before `release`."""
        self.release = asyncio.Event()
        self.cancelled: Counter[int] = Counter()
        self.running = 0

    async def __call__(self, path: str, data: bytes, caller: Caller, call: Any) -> None:
        body = json.loads(data)
        self.asked.append(body)
        self.callers.append(caller)
        self.running += 1
        try:
            if self.failures.get(body["n"]):
                raise self.failures[body["n"]].pop(0)
            if self.held(body):
                await self.release.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled[body["n"]] += 1
            raise
        finally:
            self.running -= 1
        call.send(HttpBody(content_type="application/json", data=json.dumps({"answer": body["n"]}).encode()))


class Scene:
    """One directory, and any number of runners on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = ReadClock()
        self.directory = BatchDirectory(root)
        self.files = FileStore(self.directory, 10**9, RETENTION_S, self.clock)
        self.store = BatchStore(self.directory, self.files, RETENTION_S, self.clock)
        self.endpoint = ScriptedEndpoint()
        self.outcomes: Counter[str] = Counter()
        self.share = BackgroundShare(8, 0.1, monotonic)

    def upload(self, content: bytes, tenant: str = "") -> str:
        """A file of a tenant; returns its id."""
        part = self.directory.uploads / new_id("upload-")
        part.write_bytes(content)
        return self.files.add(tenant, part, new_id("file-"), "rows.jsonl", "batch").id

    def create(self, content: bytes, tenant: str = "", **changes: Any) -> Batch:
        """A batch of a tenant."""
        now_s = int(self.clock())
        batch = Batch(
            id=new_id("batch_"),
            tenant=tenant,
            endpoint=URL,
            input_file_id=self.upload(content, tenant),
            created_at=now_s,
            expires_at=now_s + WINDOW_S,
            **changes,
        )
        self.store.add(batch)
        return batch

    @asynccontextmanager
    async def runner(self, endpoint: ScriptedEndpoint | None = None) -> AsyncIterator[BatchRunner]:
        """A process that runs batches when no other one of the scene does."""
        deps = RunDeps(
            self.directory,
            self.files,
            self.store,
            RowGate(self.share, lambda: True),
            endpoint or self.endpoint,
            self.clock,
            line_bytes_max=65_536,
            count=lambda outcome: self.outcomes.update((outcome,)),
        )
        runner = BatchRunner(deps)
        task = asyncio.create_task(runner.run())
        try:
            yield runner
        finally:
            task.cancel()
            await asyncio.wait({task})

    def now(self, batch: Batch) -> Batch:
        """The batch as a client sees it now."""
        return self.store.get(batch.tenant, batch.id)

    async def until(self, batch: Batch, *statuses: Status) -> Batch:
        """Wait for a status; any end, if none is given."""
        await assert_eventually(
            lambda: self.now(batch).status in statuses if statuses else self.now(batch).has_ended, within_s=30
        )
        return self.now(batch)

    def output(self, batch: Batch) -> list[Any]:
        """Lines of the output file."""
        return self._lines(batch, self.now(batch).output_file_id)

    def errors(self, batch: Batch) -> list[Any]:
        """Lines of the error file."""
        return self._lines(batch, self.now(batch).error_file_id)

    def _lines(self, batch: Batch, file_id: str | None) -> list[Any]:
        if file_id is None:
            return []
        text = self.files.path(batch.tenant, file_id).read_text()
        return [json.loads(line) for line in text.splitlines()]


def names(lines: Sequence[Any]) -> list[str]:
    """Custom ids of results."""
    return [line["custom_id"] for line in lines]
