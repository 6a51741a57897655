"""The admission hop: how many requests may be open at a time, and whether any may come at all.

Refuses before the first byte. Waiting in line is left to the engines, which batch what they are given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from tandem.errors import Draining, Overloaded

RETRY_DELAY_S = 1.0


class Admission:
    """Counts the open requests of this frontend."""

    def __init__(self, open_requests_max: int) -> None:
        self._open_requests_max = open_requests_max
        self._open_count = 0
        self._is_closed = False
        self._none = asyncio.Event()
        self._none.set()

    @property
    def open_count(self) -> int:
        """Requests that have not ended yet."""
        return self._open_count

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            Draining: this frontend is going away.
            Overloaded: all places are taken.
        """
        if self._is_closed:
            raise Draining("this frontend is going away")
        if self._open_count >= self._open_requests_max:
            raise Overloaded(f"{self._open_count} requests are open here already", retry_delay_s=RETRY_DELAY_S)
        self._open_count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._open_count -= 1
            if not self._open_count:
                self._none.set()

    def close(self) -> None:
        """Admit nobody from now on."""
        self._is_closed = True

    async def wait_none(self) -> None:
        """Return when no request is open."""
        await self._none.wait()
