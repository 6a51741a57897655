"""One request's output stream, which outlives the worker that parses it.

Owns the text so far: when its worker ends, the stream is opened in another one, which parses the same texts again, and
what they produced before is not returned twice.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from tandem.errors import ParserFailed
from tandem.output_parsers import deltas
from tandem.output_parsers.deltas import Delta
from tandem.output_parsers.worker_connection import WorkerConnection, WorkerEnded

log = logging.getLogger(__name__)

ENDS_MAX = 2
"""Workers that may end while they work on one stream: where the host ends, all of them do."""


class ParsedStream:
    """One request's output stream. Leaving its context before `close` abandons it."""

    def __init__(
        self, worker: Callable[[], Awaitable[WorkerConnection]], stream_id: int, wanted: Mapping[str, Any]
    ) -> None:
        """`worker` finds a worker. `wanted` is the message that opens the stream."""
        self._find = worker
        self._worker: WorkerConnection | None = None
        self._id = stream_id
        self._wanted = wanted
        self._texts: list[str] = []
        self._ends = 0
        self._is_open = True
        self.keep_special_tokens = False
        """Whether to detokenize with special tokens, because the format's markers are special tokens."""

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker that parses it; None between two."""
        return self._worker.pid if self._worker is not None else None

    async def __aenter__(self) -> ParsedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    async def open(self) -> None:
        """Open the stream in a worker; `feed` repeats it when that worker ends.

        Raises:
            InvalidRequest, ParserFailed, ServiceError: see `Parsers.open`.
        """
        await self._call(None)

    async def feed(self, text: str) -> list[Delta]:
        """Parse the next text of the model; returns the deltas that are final now.

        Raises:
            ParserFailed: the parser failed on this text, exceeded a bound, or ended one worker after another.
            ServiceError: its worker ended and no other is ready.
        """
        assert self._is_open, "feed() after the end"
        if not text:
            return []
        found = await self._call({"op": "feed", "text": text})
        self._texts.append(text)
        return deltas.read(found["deltas"])

    async def close(self, *, complete: bool = True) -> list[Delta]:
        """End the model's output; returns the deltas that were held back.

        Args:
            complete: the model ended by itself. False: the output was cut off, perhaps in the middle of a call.

        Raises:
            ParserFailed, ServiceError: as `feed`.
        """
        assert self._is_open, "close() after the end"
        found = await self._call({"op": "close", "complete": complete})
        self._leave()
        return deltas.read(found["deltas"])

    def abandon(self) -> None:
        """Discard the rest of the output. Safe after the end."""
        if self._is_open and self._worker is not None:
            self._worker.send({"op": "forget", "id": self._id})
        self._leave()

    async def _call(self, message: Mapping[str, Any] | None) -> dict[str, Any]:
        """The response of the stream's worker, or of the next one if that ends. None: only open the stream."""
        while True:
            try:
                opened = await self._ensure_open()
                if message is None or self._worker is None:
                    return opened
                return await self._worker.call({**message, "id": self._id})
            except WorkerEnded as end:
                self._worker = None
                self._ends += end.was_at_work
                if end.was_at_work and (end.did_not_respond or self._ends > ENDS_MAX):
                    self._leave()
                    raise ParserFailed(f"the model's output could not be parsed: {end}") from None
            except ParserFailed:
                self._leave()
                raise

    async def _ensure_open(self) -> dict[str, Any]:
        if self._worker is not None:
            return {}
        worker = await self._find()
        self._worker = worker
        try:
            response = await worker.call({"op": "open", "id": self._id, **self._wanted, "replay": self._texts})
        except BaseException:
            # Cancelled, for example: the worker must not keep what has no owner.
            worker.send({"op": "forget", "id": self._id})
            self._worker = None
            raise
        self.keep_special_tokens = response["keep_special_tokens"]
        return response

    def _leave(self) -> None:
        self._is_open = False
        self._worker = None
        self._texts.clear()
