"""One pool: decode workers that can receive KV from the same prefill workers, and those; or all aggregated workers.

Pure. Keeps its members sorted by context length and grouped by their marks, so that some can be excluded without
iterating over the others. `pools` decides which workers form a pool.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from operator import itemgetter
from typing import NamedTuple

from tandem.domain.worker import Start, Worker

UNHEALTHY, FAILING, REFUSED = 1, 2, 4
"""Marks of a worker that is avoided while there are others, one bit each: it failed a health check, its circuit breaker
is open, it refused a leg lately."""
KEPT_MAX = 64
"""Results cached per pool, and for all pools: one per combination of marks and set of workers that fit a prompt."""

Entry = tuple[int, str, int, Worker]
"""(context in tokens, worker id, epoch, worker), sorted by the first three."""
Segment = tuple[Sequence[Entry], int]
"""Entries, and the index of the first that may be chosen."""

_context = itemgetter(0)


class Flat(NamedTuple):
    """Workers as lists."""

    ids: list[str]
    members: list[Worker]
    """In the order of `ids`."""
    places: dict[str, int]
    """Index of each id."""
    starts: dict[Start, int]
    """The same of each start."""


class Live:
    """Workers that may be picked: a sequence that reads the pools' own lists, valid until the next change of a pool."""

    __slots__ = ("_ends", "_flat", "_numbers", "_skipped", "segments")

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self._ends = list(accumulate([len(entries) - begin for entries, begin in segments]))
        self._numbers: dict[int, int] | None = None
        """Segment number by `id` of its entries; None: not computed yet."""
        self._skipped: Sequence[int] = ()
        """Excluded workers, as indices into all segments, ascending."""
        self._flat: Flat | None = None

    def __len__(self) -> int:
        return self._ends[-1] - len(self._skipped) if self._ends else 0

    def __getitem__(self, index: int) -> Worker:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for skipped in self._skipped:
            index += skipped <= index
        number = bisect_right(self._ends, index)
        entries, begin = self.segments[number]
        return entries[begin + index - (self._ends[number - 1] if number else 0)][-1]

    def __iter__(self) -> Iterator[Worker]:
        index = 0
        for entries, begin in self.segments:
            for entry in islice(entries, begin, None):
                if index not in self._skipped:
                    yield entry[-1]
                index += 1

    def flat(self) -> Flat:
        """The same as lists. Computed once: most requests share their `Live`."""
        if self._flat is None:
            workers = list(self)
            ids = [worker.worker_id for worker in workers]
            places = {worker_id: at for at, worker_id in enumerate(ids)}
            self._flat = Flat(ids, workers, places, {worker.start: at for at, worker in enumerate(workers)})
        return self._flat

    @property
    def context_tokens_max(self) -> int:
        """The largest context among them, before any exclusion."""
        return max(entries[-1][0] for entries, _ in self.segments)

    def without(self, members: Iterable[Member]) -> Live:
        """The same workers without some, which need not be among them. Costs nothing for the others."""
        assert not self._skipped, "workers excluded before would be included again"
        skipped = [index for member in members if (index := self._index(member)) is not None]
        if not skipped:
            return self
        left = Live.__new__(Live)
        left.segments, left._ends, left._numbers = self.segments, self._ends, self._numbers
        left._skipped = sorted(skipped)
        left._flat = None
        return left

    def _index(self, member: Member) -> int | None:
        if self._numbers is None:
            self._numbers = {id(entries): number for number, (entries, _) in enumerate(self.segments)}
        for entries in member.lists():
            number = self._numbers.get(id(entries))
            if number is not None:
                at = bisect_left(entries, member.entry) - self.segments[number][1]
                return at + (self._ends[number - 1] if number else 0) if at >= 0 else None
        return None


class Member:
    """A worker in the groups that it belongs to."""

    __slots__ = ("entry", "groups", "marks", "pool", "worker")

    def __init__(self, worker: Worker, groups: tuple[Group, ...], pool: Pool | None, marks: int) -> None:
        """`pool` is the pool whose requests the worker streams; None: it is a prefill worker."""
        self.worker = worker
        self.entry: Entry = (worker.capabilities.context_tokens_max, worker.worker_id, worker.epoch, worker)
        self.groups = groups
        self.pool = pool
        self.marks = marks
        self._enter()

    def is_live(self, avoided: int, prompt_tokens: int) -> bool:
        """Whether its marks and its context allow it to be picked."""
        return not self.marks & avoided and self.entry[0] > prompt_tokens

    def pools(self) -> Iterator[Pool]:
        """The pools that it belongs to."""
        return (pool for group in self.groups for pool in group.pools)

    def lists(self) -> Iterator[Sequence[Entry]]:
        """The list that contains it, in each of its groups."""
        return (group.entries(self.marks) for group in self.groups)

    def mark(self, marks: int) -> None:
        """Replace its marks."""
        self.leave()
        self.marks = marks
        self._enter()

    def leave(self) -> None:
        """Leave its groups."""
        for group in self.groups:
            group.remove(self.entry, self.marks)

    def _enter(self) -> None:
        for group in self.groups:
            group.add(self.entry, self.marks)


class Group:
    """Workers sorted by context, one list per combination of marks."""

    def __init__(self) -> None:
        self.pools: list[Pool] = []
        """The pools that it belongs to."""
        self._by_marks: dict[int, list[Entry]] = {}
        """Without empty lists."""

    def __bool__(self) -> bool:
        return bool(self._by_marks)

    def add(self, entry: Entry, marks: int) -> None:
        """Add a worker."""
        insort(self._by_marks.setdefault(marks, []), entry)
        self._forget_shares()

    def remove(self, entry: Entry, marks: int) -> None:
        """Remove a worker."""
        entries = self._by_marks[marks]
        del entries[bisect_left(entries, entry)]
        if not entries:
            del self._by_marks[marks]
        self._forget_shares()

    def entries(self, marks: int) -> Sequence[Entry]:
        """Workers with exactly these marks."""
        return self._by_marks[marks]

    def segments(self, avoided: int, prompt_tokens: int) -> list[Segment]:
        """Members without any of the marks `avoided` whose context holds the prompt and at least one token more."""
        found: list[Segment] = []
        for marks, entries in self._by_marks.items():
            if not marks & avoided:
                # As a rule all of them are large enough.
                begin = 0 if entries[0][0] > prompt_tokens else bisect_right(entries, prompt_tokens, key=_context)
                if begin < len(entries):
                    found.append((entries, begin))
        return found

    def _forget_shares(self) -> None:
        for pool in self.pools:
            pool.forget_shares()


@dataclass(frozen=True, slots=True)
class Share:
    """The routes of one pool under some conditions."""

    streams: Live
    """Decode workers, or aggregated ones."""
    prefills: Live | None
    """Prefill workers compatible with all of them; None in the pool of aggregated workers."""
    routes_count: int
    """Pairs, or aggregated workers."""


class Pool:
    """Decode workers that can receive KV from the same prefill workers."""

    def __init__(self, keys: tuple[Hashable, ...], prefills: tuple[Group, ...] | None) -> None:
        self.keys = keys
        self.streams = Group()
        self.prefills = prefills
        self._shares: dict[tuple[int, float], Share] = {}
        for group in (self.streams, *(prefills or ())):
            group.pools.append(self)

    def share(self, avoided: int, prompt_tokens: int, bound: float) -> Share:
        """Its routes. `bound`, the cache key of the prompt's length, is the smallest context of any pool that holds it.

        Not its rank among all contexts: that changes when a worker of another pool comes or goes.
        """
        known = self._shares.get((avoided, bound))
        if known is None:
            if len(self._shares) >= KEPT_MAX:
                self._shares.clear()
            known = self._shares[avoided, bound] = self._share(avoided, prompt_tokens)
        return known

    def forget_shares(self) -> None:
        """Drop the cache: a member was added or removed, or its marks changed."""
        self._shares.clear()

    def _share(self, avoided: int, prompt_tokens: int) -> Share:
        streams = Live(self.streams.segments(avoided, prompt_tokens))
        if self.prefills is None:
            return Share(streams, None, len(streams))
        prefills = Live([part for group in self.prefills for part in group.segments(avoided, prompt_tokens)])
        return Share(streams, prefills, len(streams) * len(prefills))
