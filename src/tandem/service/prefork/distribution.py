"""Which child gets a connection: the one that serves, takes what it is given, and has fewest; of several, the one with
the fewest open calls, and then the one whose turn was longest ago.

Neither SO_REUSEPORT nor one accept queue for all: clients of gRPC keep few connections for long, and either would leave
processes without any (docs/adr/0014). Owns the accepted sockets until a child has been given them; never reads a byte
of them. While no child can take one, none is accepted and clients wait in the kernel.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tandem.service.prefork.process import State

PREFERENCE = (State.SERVING, State.OPEN, State.DRAINING)
"""One that serves, else one that says that it does not yet, else one that says that it does not any more."""


class Candidate(Protocol):
    """A child, as far as this is about it."""

    state: State
    call_count: int
    given_number: int
    """Of the last connection that it was given, in the order of all; 0: none."""

    @property
    def can_take(self) -> bool:
        """Whether it can be given a connection now."""
        ...

    @property
    def is_late(self) -> bool:
        """Whether it has let a connection lie."""
        ...

    @property
    def connection_count(self) -> int:
        """Connections that it has."""
        ...

    def give(self, connection: socket.socket, number: int) -> None:
        """Give it one, the `number`th of all."""
        ...


class Accepting(Protocol):
    """A listening socket: `tandem.rpc.http2.listener.Listener`."""

    def begin(self, take: Callable[[socket.socket], None]) -> None:
        """Accept connections and hand each to `take`."""
        ...

    def pause(self) -> None:
        """Leave new connections in the kernel's queue."""
        ...

    def resume(self) -> None:
        """Accept again."""
        ...

    def close(self) -> None:
        """Accept no more connections."""
        ...


def fittest(candidates: Iterable[Candidate]) -> Candidate | None:
    """The child that gets the next connection; None: none can take one."""
    able = [candidate for candidate in candidates if candidate.can_take]
    for state in PREFERENCE:
        peers = [candidate for candidate in able if candidate.state is state]
        if peers:
            return min(peers, key=_rank)
    return None


def _rank(peer: Candidate) -> tuple[bool, int, int, int]:
    return peer.is_late, peer.connection_count, peer.call_count, peer.given_number


def releases(counts: Sequence[int], newcomer: int) -> list[int]:
    """How many connections each child should let go of, so that a newcomer gets its share as their clients come back.

    Args:
        counts: connections of each child that serves.
        newcomer: index of the one that serves since a moment ago.
    """
    wanted = sum(counts) // len(counts) - counts[newcomer]
    left, released = list(counts), [0] * len(counts)
    for _ in range(wanted):
        most = max(range(len(left)), key=left.__getitem__)
        left[most] -= 1
        released[most] += 1
    return released


class Distributor:
    """Gives the connections of one listening socket away."""

    def __init__(self, listener: Accepting, candidates: Callable[[], Iterable[Candidate]]) -> None:
        """`candidates` are the children of this moment."""
        self._listener = listener
        self._candidates = candidates
        self._waiting: deque[socket.socket] = deque()
        """Accepted and not given away yet: those of one turn of the loop at most, and what came back."""
        self._numbers = itertools.count(1)
        self._is_paused = False

    def begin(self) -> None:
        """Accept from now on."""
        self._listener.begin(self._take)

    def give_again(self, connections: Iterable[socket.socket]) -> None:
        """These were given to one that has ended before it took them. They come first."""
        self._waiting.extendleft(reversed(list(connections)))
        self.reevaluate()

    def reevaluate(self) -> None:
        """Give away what waits: a child may be able to take a connection now."""
        while self._waiting:
            found = fittest(self._candidates())
            if found is None:
                self._pause(paused=True)
                return
            found.give(self._waiting.popleft(), next(self._numbers))
        self._pause(paused=False)

    def close(self) -> None:
        """Accept no more connections, and close those that wait. May be called twice."""
        self._listener.close()
        while self._waiting:
            self._waiting.popleft().close()

    def _take(self, connection: socket.socket) -> None:
        self._waiting.append(connection)
        self.reevaluate()

    def _pause(self, *, paused: bool) -> None:
        if paused is not self._is_paused:
            self._is_paused = paused
            if paused:
                self._listener.pause()
            else:
                self._listener.resume()
