"""Calls to the other processes of this frontend, all at once; one that does not respond is left out.

Owns their addresses, and logs when one stops responding. A frontend with one process has no siblings.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tandem.client.sibling_calls import SiblingCalls
from tandem.errors import TandemError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Siblings:
    """The siblings of this process."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        """`paths`: the sockets of the siblings, by number."""
        self._calls = {number: SiblingCalls(path) for number, path in paths.items()}
        self._silent: set[int] = set()

    async def ask(self, call: Callable[[SiblingCalls], Awaitable[T]]) -> list[T]:
        """The responses of all siblings that respond in time, in the order of their numbers."""
        pending = (self._response(number, call(calls)) for number, calls in self._calls.items())
        return [response for responses in await asyncio.gather(*pending) for response in responses]

    @property
    def silent(self) -> list[int]:
        """Numbers of the siblings that did not respond to the last call."""
        return sorted(self._silent)

    async def _response(self, number: int, pending: Awaitable[T]) -> list[T]:
        """The response as a list; an empty list if there is none."""
        try:
            response = await pending
        except TandemError as problem:
            if number not in self._silent:
                log.warning("process %d of this frontend does not respond; results are without it: %s", number, problem)
            self._silent.add(number)
            return []
        self._silent.discard(number)
        return [response]
