"""The pool of encoding processes: started on demand up to a limit, each encoding one text at a time.

Owns their start and end. When a process fails, only the text that it was encoding fails; the next text gets a new
process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from tandem.errors import Draining
from tandem_frontend.preparation.encoding.process import EncoderProcess, EncoderSpec
from tandem_frontend.preparation.encoding.texts import TooManyTokens
from tandem_frontend.preparation.encoding.turns import Turns

log = logging.getLogger(__name__)


class EncoderPool:
    """Encoding processes of one tokenizer."""

    def __init__(self, spec: EncoderSpec, width: int) -> None:
        """`width` limits the processes, and so the texts encoded at a time."""
        self._spec = spec
        self._turns = Turns(width)
        self._idle: list[EncoderProcess] = []
        self._busy: set[EncoderProcess] = set()
        self._is_closed = False

    @property
    def waiting_count(self) -> int:
        """Texts that wait for a process."""
        return self._turns.waiting_count

    @property
    def pids(self) -> list[int]:
        """Process ids of all running processes."""
        return [process.pid for process in (*self._idle, *self._busy)]

    async def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of a text.

        Raises:
            TooManyTokens: the text has more tokens than allowed.
            ServiceError: the process failed, or could not be started.
        """
        return await self._turns.run(partial(self._encode, text, add_special_tokens))

    async def close(self) -> None:
        """End all processes; texts that wait or are being encoded fail."""
        self._is_closed = True
        await asyncio.gather(*(process.stop() for process in (*self._idle, *self._busy)))
        self._idle.clear()
        await self._turns.wait_idle()

    async def _encode(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        process = await self._take()
        self._busy.add(process)
        try:
            ids = await process.encode(text, add_special_tokens=add_special_tokens)
        except TooManyTokens:
            self._idle.append(process)
            raise
        except BaseException as problem:  # cancelled or failed, the process is in an unknown state
            log.error("%s (pid %d); the next long prompt gets a new process", problem or "cancelled", process.pid)
            await process.stop()
            raise
        else:
            self._idle.append(process)
            return ids
        finally:
            self._busy.discard(process)

    async def _take(self) -> EncoderProcess:
        """An idle or a new process. The caller holds a turn, so there are fewer than `width`."""
        self._check_open()
        while self._idle:
            process = self._idle.pop()
            if not process.has_ended:
                return process
            log.error("the process that tokenises long prompts has ended (pid %d); starting a new one", process.pid)
            await process.stop()
        process = await EncoderProcess.start(self._spec)
        try:
            self._check_open()
        except Draining:
            await process.stop()
            raise
        return process

    def _check_open(self) -> None:
        if self._is_closed:
            raise Draining("this frontend is stopping")
