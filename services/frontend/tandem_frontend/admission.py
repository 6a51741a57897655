"""The admission hop: how many requests may be here, and which of them goes to the workers next.

Bounded twice: the requests in this frontend, refused at once beyond that, and the requests and tokens the workers have
room for, which the others wait for in line. Who is next is `waiting_line`'s, how much room there is `capacity`'s.
Everything is decided before the first byte.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from tandem.errors import DeadlinePassed, Draining, Overloaded
from tandem.runtime.clock import Clock
from tandem_frontend.waiting_line import Demand, WaitingLine

RETRY_DELAY_MIN_S = 1.0
RETRY_DELAY_MAX_S = 30.0
RATE_WINDOW_S = 5.0
"""Over which the speed of the line is averaged."""


class Room(Protocol):
    """How much the workers can take."""

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether one more request of so many tokens has room beside those this frontend has with the workers."""
        ...


class Admission:
    """Places of this frontend's requests."""

    def __init__(self, open_requests_max: int, room: Room, clock: Clock) -> None:
        self._open_requests_max = open_requests_max
        self._room = room
        self._clock = clock
        self._line: WaitingLine[asyncio.Future[None]] = WaitingLine()
        self._open_count = 0
        self._held_requests = 0
        self._held_tokens = 0
        self._rate = _Rate(clock)
        self._is_closed = False
        self._none = asyncio.Event()
        self._none.set()

    @property
    def open_count(self) -> int:
        """Requests that have not ended yet."""
        return self._open_count

    @property
    def waiting_count(self) -> int:
        """Those of them that wait for room."""
        return len(self._line)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Be one of the requests of this frontend.

        Raises:
            Draining: this frontend is going away.
            Overloaded: there are too many.
        """
        if self._is_closed:
            raise Draining("this frontend is going away")
        if self._open_count >= self._open_requests_max:
            raise Overloaded(
                f"{self._open_count} requests are open here already", retry_delay_s=self._delay_s(self._line.tokens)
            )
        self._open_count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._open_count -= 1
            if not self._open_count:
                self._none.set()

    @asynccontextmanager
    async def place(self, demand: Demand) -> AsyncIterator[None]:
        """Wait in line for room with the workers, and hold it.

        Raises:
            Overloaded: its deadline would pass in the line, as fast as that moves now.
            DeadlinePassed: it has passed in the line.
        """
        await self._wait(demand)
        try:
            yield
        finally:
            self._rate.note(demand.tokens)
            self._held_requests -= 1
            self._held_tokens -= demand.tokens
            self.look_again()

    def look_again(self) -> None:
        """Let in who has room now: a request has ended, or the workers have changed."""
        while (first := self._line.first()) is not None and self._fits(first[1]):
            place, demand = self._line.take()
            self._hold(demand)
            place.set_result(None)

    def close(self) -> None:
        """Admit nobody from now on. Who waits in line was admitted before and stays."""
        self._is_closed = True

    async def wait_none(self) -> None:
        """Return when no request is open."""
        await self._none.wait()

    async def _wait(self, demand: Demand) -> None:
        if not len(self._line) and self._fits(demand):
            return self._hold(demand)
        self._refuse_the_late(demand)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.add(place, demand)
        self.look_again()
        try:
            async with asyncio.timeout(None if demand.deadline_s is None else demand.deadline_s - self._clock()):
                await asyncio.shield(place)
        except BaseException as problem:
            if place.done():
                # It was let in at the very moment it left.
                self._held_requests -= 1
                self._held_tokens -= demand.tokens
            self._line.remove(place)
            self.look_again()
            if isinstance(problem, TimeoutError):
                raise DeadlinePassed("the deadline passed while the request waited for a worker") from None
            raise

    def _refuse_the_late(self, demand: Demand) -> None:
        if demand.deadline_s is None:
            return
        wait_s = self._rate.seconds(self._line.tokens_before(demand))
        if wait_s is not None and self._clock() + wait_s >= demand.deadline_s:
            left_s = demand.deadline_s - self._clock()
            raise Overloaded(
                f"the line takes about {wait_s:.1f} s, and the request's deadline leaves {max(0.0, left_s):.1f} s",
                retry_delay_s=self._delay_s(self._line.tokens),
            )

    def _fits(self, demand: Demand) -> bool:
        return self._room.fits(self._held_requests, self._held_tokens, demand.tokens)

    def _hold(self, demand: Demand) -> None:
        self._held_requests += 1
        self._held_tokens += demand.tokens

    def _delay_s(self, tokens: int) -> float:
        wait_s = self._rate.seconds(tokens)
        return min(RETRY_DELAY_MAX_S, max(RETRY_DELAY_MIN_S, wait_s or 0.0))


class _Rate:
    """Tokens a second that places were given back for, in the last seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ended: deque[tuple[float, int]] = deque()

    def note(self, tokens: int) -> None:
        """A request of so many tokens has given its place back."""
        self._ended.append((self._clock(), tokens))
        self._forget()

    def seconds(self, tokens: int) -> float | None:
        """How long so many tokens take; None when nothing has ended lately, so that nobody knows."""
        self._forget()
        ended = sum(count for _, count in self._ended)
        if not ended:
            return None
        elapsed_s = max(self._clock() - self._ended[0][0], 0.5)
        return tokens * elapsed_s / ended

    def _forget(self) -> None:
        oldest_s = self._clock() - RATE_WINDOW_S
        while self._ended and self._ended[0][0] < oldest_s:
            self._ended.popleft()
