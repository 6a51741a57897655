"""The admission hop: how many requests may be here, and which of them goes to the workers next.

Bounded three times: by the requests in this frontend and by how late its event loop is, refused at once beyond that,
and by the requests and tokens the workers have room for, which the others wait for in line. Who is next is
`waiting_line`'s, how much room there is `capacity`'s. Everything is decided before the first byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Protocol

from tandem.errors import DeadlinePassed, Draining, Overloaded
from tandem.runtime.clock import Clock
from tandem_frontend.loop_load import LoopLoad
from tandem_frontend.pace import Pace
from tandem_frontend.waiting_line import Demand, WaitingLine

LAG_MAX_S = 1.0
"""Default of how late the event loop may be: each stream's next token is late by as much."""
RETRY_DELAY_MIN_S = 1.0
RETRY_DELAY_MAX_S = 30.0
SURE_SHARE, HOPELESS_SHARE = 0.9, 0.5
"""Of the requests that ended lately: as long as so many of them take, a newcomer must have, and whoever has waited and
has not even the time of half of them is not begun. The most urgent go first, so in overload all are at that edge."""
LOOK_PAUSE_S = 0.005
"""What changes within it is looked at once: a large fleet says its load hundreds of times a second."""
WAIT_MARGIN = 2.0
"""The line may come to move half as fast. With less, whoever is let in stands at the edge all the time he waits."""


class Room(Protocol):
    """How much the workers can take."""

    def counted(self, prompt_tokens: int, answer_tokens: int) -> int:
        """What a request counts for, of what it may hold at most."""
        ...

    def fits(self, held_requests: int, held_tokens: int, tokens: int) -> bool:
        """Whether one more request of so many tokens has room beside those this frontend has with the workers."""
        ...


class Admission:
    """Places of this frontend's requests."""

    def __init__(
        self,
        open_requests_max: int,
        room: Room,
        clock: Clock,
        load: LoopLoad | None = None,
        lag_max_s: float = LAG_MAX_S,
        unread_count: Callable[[], int] = lambda: 0,
    ) -> None:
        """`load` measures this process's loop, which refuses new requests while it is later than `lag_max_s`.

        `unread_count` says how many long answers are ready and wait for their clients: they count as open.
        """
        self._unread_count = unread_count
        self._open_requests_max = open_requests_max
        self._load = load or LoopLoad()
        self._lag_max_s = lag_max_s
        self._room = room
        self._clock = clock
        self._line: WaitingLine[asyncio.Future[None]] = WaitingLine()
        self._open_count = 0
        self._held_requests = 0
        self._held_tokens = 0
        self._pace = Pace(clock)
        self._look: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._none = asyncio.Event()
        self._none.set()

    @property
    def open_count(self) -> int:
        """Requests that have not ended yet, or whose long answers have not been read."""
        return self._open_count + self._unread_count()

    @property
    def waiting_count(self) -> int:
        """Those of them that wait for room."""
        return len(self._line)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Be one of the requests of this frontend.

        Raises:
            Draining: this frontend is going away.
            Overloaded: there are too many, or this process is too late with those that are open.
        """
        if self._is_closed:
            raise Draining("this frontend is going away")
        open_count = self.open_count
        if open_count >= self._open_requests_max:
            raise Overloaded(
                f"{open_count} requests are open here already", retry_delay_s=self._delay_s(self._line.tokens)
            )
        if self._load.late_s > self._lag_max_s:
            raise Overloaded(
                f"this frontend is {self._load.late_s:.1f} s late with the requests that are open",
                retry_delay_s=RETRY_DELAY_MIN_S,
            )
        self._open_count += 1
        self._load.open()
        self._none.clear()
        try:
            yield
        finally:
            self._open_count -= 1
            self._load.close()
            if not self._open_count:
                self._none.set()

    @asynccontextmanager
    async def place(self, demand: Demand) -> AsyncIterator[None]:
        """Wait in line for room with the workers, and hold it.

        Raises:
            Overloaded: its deadline would pass before its end, as fast as the line moves and requests end now.
            DeadlinePassed: it has passed in the line.
        """
        demand = replace(demand, tokens=self._room.counted(demand.tokens - demand.answer_tokens, demand.answer_tokens))
        await self._wait(demand)
        begin_s = self._clock()
        try:
            yield
        finally:
            self._pace.note(demand, self._clock() - begin_s)
            self._held_requests -= 1
            self._held_tokens -= demand.tokens
            self.look_again()

    def look_again(self) -> None:
        """Let in who has room now: a request has ended, or the workers have changed."""
        while (first := self._line.first()) is not None and self._fits(first[1]):
            place, demand = first
            if len(self._line) > 1 and self._is_late(demand, 0.0, HOPELESS_SHARE):
                # Others wait: no engine works for a client who will have gone before the end.
                self._line.remove(place)
                place.set_exception(self._too_late(demand, 0.0, HOPELESS_SHARE))
                continue
            self._line.take()
            self._hold(demand)
            place.set_result(None)

    def look_again_soon(self) -> None:
        """The same after a few milliseconds, once for all that has changed until then."""
        if self._look is None and len(self._line):
            self._look = asyncio.get_running_loop().call_later(LOOK_PAUSE_S, self._look_at_last)

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
            if place.done() and place.exception() is None:
                # It was let in at the very moment it left.
                self._held_requests -= 1
                self._held_tokens -= demand.tokens
            self._line.remove(place)
            self.look_again()
            if isinstance(problem, TimeoutError):
                raise DeadlinePassed("the deadline passed while the request waited for a worker") from None
            raise

    def _look_at_last(self) -> None:
        self._look = None
        self.look_again()

    def _refuse_the_late(self, demand: Demand) -> None:
        if demand.deadline_s is None:
            return
        before = self._line.tokens_before(demand)
        wait_s = self._pace.seconds(before)
        if wait_s is None:
            return
        if self._is_late(demand, WAIT_MARGIN * wait_s, SURE_SHARE):
            raise self._too_late(demand, wait_s, SURE_SHARE)
        own_s = self._pace.seconds(demand.tokens) or 0.0
        for other, others_before in self._line.overtaken(demand):
            wait_s = self._pace.seconds(others_before) or 0.0
            pushed_s = WAIT_MARGIN * wait_s + own_s
            # Whoever cannot be saved holds nobody up; whoever is doubtful already is not pushed further.
            if self._is_late(other, pushed_s, SURE_SHARE) and not self._is_late(other, wait_s, HOPELESS_SHARE):
                raise Overloaded(
                    "requests that wait already would miss their deadlines",
                    retry_delay_s=self._delay_s(self._line.tokens),
                )

    def _is_late(self, demand: Demand, wait_s: float, share: float) -> bool:
        """Whether the deadline passes before it ends, if it waits so long and then takes as such a share of others."""
        if demand.deadline_s is None:
            return False
        return self._clock() + wait_s + self._pace.held_s(demand, share) >= demand.deadline_s

    def _too_late(self, demand: Demand, wait_s: float, share: float) -> Overloaded:
        left_s = (demand.deadline_s or 0.0) - self._clock()
        return Overloaded(
            f"the line takes about {wait_s:.1f} s and the request itself {self._pace.held_s(demand, share):.1f} s, "
            f"and its deadline leaves {max(0.0, left_s):.1f} s",
            retry_delay_s=self._delay_s(self._line.tokens),
        )

    def _fits(self, demand: Demand) -> bool:
        return self._room.fits(self._held_requests, self._held_tokens, demand.tokens)

    def _hold(self, demand: Demand) -> None:
        self._held_requests += 1
        self._held_tokens += demand.tokens

    def _delay_s(self, tokens: int) -> float:
        wait_s = self._pace.seconds(tokens)
        return min(RETRY_DELAY_MAX_S, max(RETRY_DELAY_MIN_S, wait_s or 0.0))
