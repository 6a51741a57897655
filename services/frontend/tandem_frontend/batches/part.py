"""The batches of one frontend process: its servicer, and its runner while this process is the one that runs them.

Owns how they are put together, from the settings.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from tandem.observability.metrics import Measure, Metrics, Reading
from tandem.service.background import log_failure
from tandem_frontend.admission.background import BackgroundShare
from tandem_frontend.batches.directory import BatchDirectory
from tandem_frontend.batches.files import FileStore
from tandem_frontend.batches.gate import RowGate
from tandem_frontend.batches.rows import Answer
from tandem_frontend.batches.run import RunDeps
from tandem_frontend.batches.runner import BatchRunner
from tandem_frontend.batches.servicer import BatchServicer, Stores
from tandem_frontend.batches.store import BatchStore
from tandem_frontend.config import FrontendConfig
from tandem_frontend.models.catalog import ModelCatalog


class Batches:
    """What a frontend has of batches. Without a batch directory: a servicer that says so."""

    def __init__(self, servicer: BatchServicer, runner: BatchRunner | None, gate: RowGate | None) -> None:
        self.servicer = servicer
        self._runner = runner
        self._gate = gate
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        config: FrontendConfig,
        answer: Answer,
        models: ModelCatalog,
        share: BackgroundShare,
        metrics: Metrics,
        row_bytes_max: int,
    ) -> Batches:
        """Open the directory; nothing runs yet.

        Args:
            config: the frontend's settings.
            answer: runs the request of a row, see `OpenAiServicer.answer`.
            models: those that rows may name.
            share: what rows may have beside live requests of all models.
            metrics: counts runs of rows.
            row_bytes_max: longest line of an input.

        Raises:
            ConfigError: the directory cannot be written.
        """
        if config.batch_directory is None:
            return cls(BatchServicer(None), None, None)
        directory = await asyncio.to_thread(BatchDirectory, config.batch_directory)
        files = FileStore(directory, config.batch_tenant_bytes_max, config.batch_retention_s, time.time)
        store = BatchStore(directory, files, config.batch_retention_s, time.time)
        gate = RowGate(share, partial(_has_spare, models), partial(_note_others, models))
        deps = RunDeps(
            directory, files, store, gate, answer, time.time, row_bytes_max,
            lambda outcome: metrics.count("tandem.batch.rows", attributes={"tandem.batch.outcome": outcome}),
        )  # fmt: skip
        runner = BatchRunner(deps)
        stores = Stores(directory, files, store, config.batch_file_bytes_max, time.time, runner.wake)
        if metrics.is_on:
            metrics.measure(_gauges(runner, gate))
        return cls(BatchServicer(stores), runner, gate)

    def start(self) -> None:
        """Run batches from now on, whenever no other process does."""
        if self._runner is not None:
            self._task = asyncio.create_task(self._runner.run(), name="batches")
            self._task.add_done_callback(log_failure)

    async def stop(self) -> None:
        """Stop the rows, and let another process run them. May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})


def _has_spare(models: ModelCatalog) -> bool:
    """Whether some model has room for a row: which one it names is not known before it is read."""
    return any(opened.admission.has_spare() for opened in models.opened)


def _note_others(models: ModelCatalog) -> None:
    for opened in models.opened:
        opened.admission.note_others()


def _gauges(runner: BatchRunner, gate: RowGate) -> Measure:
    async def read() -> list[Reading]:
        return [
            Reading("tandem.batch.open", runner.open_count),
            Reading("tandem.batch.rows.running", gate.running_count),
        ]

    return read
