"""Which child gets a connection: among serving children that accept connections promptly, the one with the fewest
connections; of several, the one with the fewest open calls, then the least recently chosen one.

Neither SO_REUSEPORT nor a shared accept queue: gRPC clients keep few connections for a long time, and both would leave
some processes without any (docs/adr/0014). Owns accepted sockets until they are passed to a child; never reads a byte
of them. While no child can accept one, the parent accepts none and clients wait in the kernel's queue.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tandem.service.prefork.process import State

PREFERENCE = (State.SERVING, State.OPEN, State.DRAINING)
"""States in order of preference: serving, else not serving yet, else draining."""


class Candidate(Protocol):
    """The properties of a child that decide."""

    state: State
    call_count: int
    given_number: int
    """Number of the last connection passed to it, counted over all children; 0: none."""

    @property
    def can_take(self) -> bool:
        """Whether a connection can be passed to it now."""
        ...

    @property
    def is_late(self) -> bool:
        """Whether it has not confirmed a connection in time."""
        ...

    @property
    def connection_count(self) -> int:
        """Number of its connections."""
        ...

    def give(self, connection: socket.socket, number: int) -> None:
        """Pass a connection to it, the `number`th of all."""
        ...


class Accepting(Protocol):
    """A listening socket: `tandem.rpc.http2.listener.Listener`."""

    def begin(self, take: Callable[[socket.socket], None]) -> None:
        """Accept connections and call `take` with each."""
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
    """The child that gets the next connection; None: no child can take one."""
    able = [candidate for candidate in candidates if candidate.can_take]
    for state in PREFERENCE:
        peers = [candidate for candidate in able if candidate.state is state]
        if peers:
            return min(peers, key=_rank)
    return None


def _rank(peer: Candidate) -> tuple[bool, int, int, int]:
    return peer.is_late, peer.connection_count, peer.call_count, peer.given_number


def releases(counts: Sequence[int], newcomer: int) -> list[int]:
    """How many connections each child should release, so that a new child gets its share when their clients reconnect.

    Args:
        counts: connections of each serving child.
        newcomer: index of the child that has just begun to serve.
    """
    wanted = sum(counts) // len(counts) - counts[newcomer]
    left, released = list(counts), [0] * len(counts)
    for _ in range(wanted):
        most = max(range(len(left)), key=left.__getitem__)
        left[most] -= 1
        released[most] += 1
    return released


class Distributor:
    """Distributes the connections of one listening socket to children."""

    def __init__(self, listener: Accepting, candidates: Callable[[], Iterable[Candidate]]) -> None:
        """`candidates` returns the current children."""
        self._listener = listener
        self._candidates = candidates
        self._waiting: deque[socket.socket] = deque()
        """Accepted connections without a child: of one loop iteration at most, and those returned by dead children."""
        self._numbers = itertools.count(1)
        self._is_paused = False

    def begin(self) -> None:
        """Start to accept connections."""
        self._listener.begin(self._take)

    def give_again(self, connections: Iterable[socket.socket]) -> None:
        """Redistribute, before all others, connections of a child that exited before it accepted them."""
        self._waiting.extendleft(reversed(list(connections)))
        self.reevaluate()

    def reevaluate(self) -> None:
        """Distribute waiting connections: a child may be able to take one now."""
        while self._waiting:
            found = fittest(self._candidates())
            if found is None:
                self._pause(paused=True)
                return
            found.give(self._waiting.popleft(), next(self._numbers))
        self._pause(paused=False)

    def close(self) -> None:
        """Accept no more connections, and close waiting ones. May be called twice."""
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
