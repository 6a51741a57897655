"""Ctrl-C while a command has a cluster: the first one asks for the end, the second one ends everything at once.

Owns the two signals and what is said on them. What ending means is the command's.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rich.console import Console

EXIT_INTERRUPTED = 130
EXIT_SECOND_SIGNAL = 70

T = TypeVar("T")


class Interruption:
    """The signals of one command, from its construction on."""

    def __init__(self, console: Console, end_at_once: Callable[[], None]) -> None:
        """`end_at_once` is called on the second signal, last of all."""
        self.asked = asyncio.Event()
        self.second_status = EXIT_INTERRUPTED
        """Exit status after a second signal."""
        self._console = console
        self._end_at_once = end_at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._handle)

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of some work; None when a signal came first, and the work has been cancelled and has ended."""
        working = asyncio.create_task(work)
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self.asked.is_set():
            working.cancel()
            await asyncio.wait({working})
            return None
        return await working

    def _handle(self) -> None:
        if self.asked.is_set():
            self._end_at_once()
            # A live display hides it.
            self._console.show_cursor(True)
            os._exit(self.second_status)
        self._console.print("stopping (Ctrl-C again to end at once)", highlight=False)
        self.asked.set()
