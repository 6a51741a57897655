"""The other processes of this frontend, asked all at once; one that does not answer is left out.

Owns their addresses and what is logged when one is silent. A frontend of one process has none.
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
    """See the module."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        """Where each of the others answers, by its number."""
        self._calls = {number: SiblingCalls(path) for number, path in paths.items()}
        self._silent: set[int] = set()

    async def ask(self, question: Callable[[SiblingCalls], Awaitable[T]]) -> list[T]:
        """The answers of those that give one in time, in the order of their numbers."""
        asked = (self._answer(number, question(calls)) for number, calls in self._calls.items())
        return [answer for found in await asyncio.gather(*asked) for answer in found]

    @property
    def silent(self) -> list[int]:
        """Those that gave no answer when they were asked last."""
        return sorted(self._silent)

    async def _answer(self, number: int, answer: Awaitable[T]) -> list[T]:
        try:
            found = await answer
        except TandemError as problem:
            if number not in self._silent:
                log.warning("process %d of this frontend does not answer and is left out: %s", number, problem)
            self._silent.add(number)
            return []
        self._silent.discard(number)
        return [found]
