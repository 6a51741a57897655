"""Runs one batch, from the check of its input to its files, and again from where another process has left it.

Owns the order. A process may be killed at any point: every step finds what was done before it, and the last one, which
names the files in the batch's description, is one atomic write.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem.clock import Clock
from tandem_frontend.batches.directory import BatchDirectory, in_thread, new_id
from tandem_frontend.batches.files import FileStore
from tandem_frontend.batches.gate import RowGate
from tandem_frontend.batches.input_rows import Row, RowReader, check, custom_ids
from tandem_frontend.batches.journal import Entry, Journal, read_entries, write_results
from tandem_frontend.batches.records import Batch, RowError, Status
from tandem_frontend.batches.rows import Answer, Later, Result, not_run, run_row
from tandem_frontend.batches.store import BatchStore

log = logging.getLogger(__name__)

READ_ROWS = 64
"""Rows read at a time."""
POLL_S = 0.5
"""Between two looks at whether a batch was cancelled or has expired; and between two writes of its counts."""
Count = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RunDeps:
    """What every run needs."""

    directory: BatchDirectory
    files: FileStore
    store: BatchStore
    gate: RowGate
    answer: Answer
    clock: Clock
    """Time of day."""
    line_bytes_max: int
    count: Count = lambda outcome: None
    """Called with the outcome of each run of a row: completed, failed, stopped or repeated."""
    turns: dict[str, asyncio.Lock] = field(default_factory=dict)
    """By tenant: its batches run one after the other."""


class EndedElsewhere(Exception):
    """Another process has ended the batch: the lock does not hold on this file system."""


@dataclass(slots=True)
class _Waiting:
    row: Row
    failures: int = 0
    stop_count: int = 0


class BatchRun:
    """One run of one batch."""

    def __init__(self, batch: Batch, deps: RunDeps) -> None:
        self._batch = batch
        self._deps = deps
        self._folder = deps.store.folder(batch)
        self._input = self._folder / "input"
        self._done = bytearray()
        self._again: deque[_Waiting] = deque()
        self._read: deque[_Waiting] = deque()
        self._open = 0
        """Rows that run."""
        self._changed = asyncio.Event()
        self._pause_until_s = 0.0
        """On the event loop's clock."""

    async def run(self) -> None:
        """Run the batch to its end.

        Raises:
            OSError: the directory failed; another run may succeed.
            EndedElsewhere: two processes have run the batch.
        """
        if self._batch.status is Status.VALIDATING and not await self._validate():
            return
        while not await self._finish(await self._rows_until_end()):
            log.warning("%s: results of some rows are lost; they run again", self._batch.id)

    async def _validate(self) -> bool:
        """Check the input. Returns whether the batch goes on."""
        deps = self._deps
        ending = await self._ending()
        if ending is not None:
            await self._end_at_once(ending)
            return False
        total, errors = await in_thread(check, self._input, self._batch.endpoint, deps.line_bytes_max)
        if errors:
            log.info("%s has failed: %d errors in its input", self._batch.id, len(errors))
            await self._end_at_once(Status.FAILED, errors)
            return False
        await self._enter(Status.IN_PROGRESS, total=total)
        return True

    async def _end_at_once(self, status: Status, errors: tuple[RowError, ...] = ()) -> None:
        """No row has run, so there are no files."""
        await self._enter(status, errors=errors)
        await in_thread(self._deps.store.clear, self._batch)

    async def _enter(self, status: Status, **changes: object) -> None:
        self._batch = self._batch.entering(status, self._deps.clock(), **changes)
        await in_thread(self._deps.store.write, self._batch)

    async def _ending(self) -> Status | None:
        """How the batch must end now; None: it may go on."""
        batch = await in_thread(self._deps.store.get, self._batch.tenant, self._batch.id)
        if batch.has_ended:
            raise EndedElsewhere
        if batch.cancelling_at is not None:
            return Status.CANCELLED
        return Status.EXPIRED if self._deps.clock() >= self._batch.expires_at else None

    async def _rows_until_end(self) -> Status:
        """Run the rows that have no result. Returns how the batch ends."""
        if self._batch.status is Status.FINALIZING and (ending := await self._ending()) is not None:
            return ending
        entries = await in_thread(read_entries, self._folder, self._batch.total)
        self._done = bytearray(entry is not None for entry in entries)
        failed = sum(entry is not None and entry.is_error for entry in entries)
        self._batch = replace(self._batch, completed=sum(self._done) - failed, failed=failed)
        rows = asyncio.create_task(self._run_rows(), name=f"{self._batch.id}-rows")
        watch = asyncio.create_task(self._watch(), name=f"{self._batch.id}-watch")
        try:
            await asyncio.wait({rows, watch}, return_when=asyncio.FIRST_COMPLETED)
            if rows.done():
                await rows
                return Status.COMPLETED
            return await watch
        finally:
            for task in (rows, watch):
                task.cancel()
            await asyncio.wait({rows, watch})

    async def _watch(self) -> Status:
        """Write the counts while rows run. Returns when the batch must end, and how."""
        written = self._batch
        while (ending := await self._ending()) is None:
            if written != self._batch:
                written = self._batch
                await in_thread(self._deps.store.write, written, is_durable=False)
            await asyncio.sleep(POLL_S)
        return ending

    async def _run_rows(self) -> None:
        """In the tenant's turn: its batches run one after the other."""
        async with self._deps.turns.setdefault(self._batch.tenant, asyncio.Lock()):
            journal = await in_thread(Journal, self._folder)
            reader = RowReader(self._input, self._deps.line_bytes_max, self._done)
            try:
                async with asyncio.TaskGroup() as group:
                    while (waiting := await self._next(reader)) is not None:
                        await self._deps.gate.turn()
                        self._start(waiting, journal, group)
            finally:
                reader.close()
                journal.close()

    def _start(self, waiting: _Waiting, journal: Journal, group: asyncio.TaskGroup) -> None:
        self._open += 1
        work = group.create_task(
            run_row(self._deps.answer, self._batch, waiting.row, waiting.failures + 1), name=self._batch.id
        )
        self._deps.gate.start(work, waiting.stop_count)
        group.create_task(self._end(waiting, work, journal))

    async def _next(self, reader: RowReader) -> _Waiting | None:
        """The row that runs next; None: all have their results."""
        while True:
            pause_s = self._pause_until_s - asyncio.get_running_loop().time()
            if pause_s > 0:
                await asyncio.sleep(pause_s)
                continue
            if self._again:
                return self._again.popleft()
            if not self._read:
                self._read.extend(_Waiting(row) for row in await in_thread(reader.next_rows, READ_ROWS))
            if self._read:
                return self._read.popleft()
            # Meanwhile a row may have come back.
            if self._again:
                continue
            if not self._open:
                return None
            self._changed.clear()
            await self._changed.wait()

    async def _end(self, waiting: _Waiting, work: asyncio.Task[Result | Later], journal: Journal) -> None:
        """What follows the end of a row."""
        await asyncio.wait({work})
        if work.cancelled():
            # By the gate, for live requests: where the batch ends, this task is cancelled too.
            waiting.stop_count += 1
            self._repeat(waiting, "stopped")
        elif isinstance(result := work.result(), Later):
            self._put_off(waiting, result)
        else:
            await self._keep(waiting.row.number, result, journal)
            self._open -= 1
            self._changed.set()

    def _put_off(self, waiting: _Waiting, later: Later) -> None:
        waiting.failures += later.has_failed
        self._pause_until_s = max(self._pause_until_s, asyncio.get_running_loop().time() + later.wait_s)
        self._repeat(waiting, "repeated")

    def _repeat(self, waiting: _Waiting, outcome: str) -> None:
        self._deps.count(outcome)
        self._again.append(waiting)
        self._open -= 1
        self._changed.set()

    async def _keep(self, number: int, result: Result, journal: Journal) -> None:
        """Write a result to the journal."""
        await in_thread(journal.append, number, result.text, is_error=result.is_error)
        batch = self._batch
        self._done[number] = 1
        completed, failed = batch.completed + (not result.is_error), batch.failed + result.is_error
        self._batch = replace(batch, completed=completed, failed=failed)
        self._deps.count("failed" if result.is_error else "completed")

    async def _finish(self, ending: Status) -> bool:
        """Make the files, and end the batch. Returns False where rows have no result after all."""
        if self._batch.status is not Status.FINALIZING:
            await self._enter(Status.FINALIZING)
        if ending is not Status.COMPLETED:
            await in_thread(self._end_rows, ending)
        entries = await in_thread(read_entries, self._folder, self._batch.total)
        if None in entries:
            await self._enter(Status.IN_PROGRESS)
            return False
        output = await in_thread(self._make_file, entries, is_errors=False)
        errors = await in_thread(self._make_file, entries, is_errors=True)
        failed = sum(entry is not None and entry.is_error for entry in entries)
        counts = {"completed": len(entries) - failed, "failed": failed}
        await self._enter(ending, output_file_id=output, error_file_id=errors, **counts)
        await in_thread(self._deps.store.clear, self._batch)
        log.info("%s is %s: %d rows completed, %d failed", self._batch.id, ending, counts["completed"], failed)
        return True

    def _end_rows(self, ending: Status) -> None:
        """Give the rows without a result the one that the end of the batch is. Blocks."""
        entries = read_entries(self._folder, self._batch.total)
        done = bytearray(entry is not None for entry in entries)
        journal = Journal(self._folder)
        try:
            for number, custom_id in custom_ids(self._input, self._deps.line_bytes_max, done):
                journal.append(number, not_run(self._batch, number, custom_id, ending), is_error=True)
        finally:
            journal.close()

    def _make_file(self, entries: list[Entry | None], *, is_errors: bool) -> str | None:
        """The file of one kind of results, which has the same id whenever it is made; None: there are none. Blocks."""
        kind = "error" if is_errors else "output"
        file_id = "file-" + hashlib.sha256(f"{self._batch.id}:{kind}".encode()).hexdigest()[:32]
        part = self._deps.directory.uploads / new_id(f"{kind}-")
        if not write_results(entries, part, errors=is_errors):
            part.unlink()
            return None
        self._deps.files.add(
            self._batch.tenant,
            part,
            file_id,
            f"{self._batch.id}_{kind}.jsonl",
            "batch_output",
            self._batch.output_expires_s,
        )
        return file_id
