"""The processes that encode long texts: so many at most, started when there is work for them, and each for one text.

Owns their starts and their end. A process that fails takes the one text along that it was busy with; the next text gets
another process.
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
    """Processes for the long texts of one tokenizer."""

    def __init__(self, spec: EncoderSpec, width: int) -> None:
        """At most `width` processes, and as many texts at a time."""
        self._spec = spec
        self._turns = Turns(width)
        self._idle: list[EncoderProcess] = []
        self._busy: set[EncoderProcess] = set()
        self._is_closed = False

    @property
    def waiting_count(self) -> int:
        """Texts that no process has begun with."""
        return self._turns.waiting_count

    @property
    def pids(self) -> list[int]:
        """Of the processes there are."""
        return [process.pid for process in (*self._idle, *self._busy)]

    async def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of a text, in its turn.

        Raises:
            TooManyTokens: nothing was encoded.
            ServiceError: the process failed with it, or does not start.
        """
        return await self._turns.run(partial(self._encode, text, add_special_tokens))

    async def close(self) -> None:
        """End the processes; texts that wait or are being encoded are refused."""
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
        except BaseException as problem:
            log.error("%s (pid %d): the next long prompt gets another one", problem or "cancelled", process.pid)
            await process.stop()
            raise
        else:
            self._idle.append(process)
            return ids
        finally:
            self._busy.discard(process)

    async def _take(self) -> EncoderProcess:
        """A process that is ready; the turn to use one is held."""
        self._check_open()
        while self._idle:
            process = self._idle.pop()
            if not process.has_ended:
                return process
            log.error("the process that tokenises long prompts has ended (pid %d): starting another", process.pid)
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
            raise Draining("this frontend is going away")
