"""Index of the workers that can serve a request together, so that routing takes the same time in every fleet.

Pure. The index is updated when the view or a worker's marks change, in time linear in the change. `router` decides in
which order conditions are applied, the policy picks among equals.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice

from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import LEG_CONTRACT, Start, Worker, WorkerRole, WorkerState, accepted_keys, offered_keys
from tandem.errors import ServiceError
from tandem_frontend.routing.candidates import Explain, why_none
from tandem_frontend.routing.pool import FAILING, KEPT_MAX, REFUSED, UNHEALTHY, Group, Live, Member, Pool, Share


@dataclass(slots=True)
class Whole:
    """The routes of all pools under some conditions."""

    avoided: int
    """Workers with any of these marks are excluded."""
    prompt_tokens: int
    shares: dict[Pool, Share]
    """Without pools that have no route."""
    routes_count: int
    has_pairs: bool
    """Whether decode workers are among the streams."""
    _streams: Live | None = None
    _kinds: tuple[Whole, Whole] | None = None

    def kinds(self) -> tuple[Whole, Whole]:
        """The routes over pairs, and those over aggregated workers."""
        if self._kinds is None:
            self._kinds = self._of_kind(is_pair=True), self._of_kind(is_pair=False)
        return self._kinds

    def _of_kind(self, *, is_pair: bool) -> Whole:
        shares = {pool: share for pool, share in self.shares.items() if (share.prefills is not None) == is_pair}
        count = sum(share.routes_count for share in shares.values())
        return Whole(self.avoided, self.prompt_tokens, shares, count, is_pair and count > 0)

    def streams(self, but: Collection[Pool] = ()) -> Live:
        """Decode and aggregated workers, without those of the pools `but`."""
        if but:
            return Live(
                [part for pool, share in self.shares.items() if pool not in but for part in share.streams.segments]
            )
        if self._streams is None:
            self._streams = Live([part for share in self.shares.values() for part in share.streams.segments])
        return self._streams


class Selection:
    """The possible routes of one request; valid until the next change of a pool.

    Computed from the cached routes of whole pools, minus the workers that this request excludes.
    """

    def __init__(self, pools: Pools, whole: Whole, excluded: tuple[Member, ...] = ()) -> None:
        self._pools = pools
        self._whole = whole
        self._excluded = excluded
        self._empty: list[Pool] = []
        """Pools whose routes all contain an excluded worker."""
        self.routes_count = whole.routes_count
        """Pairs and aggregated workers."""
        if excluded:
            self._subtract()
        self._streams: Live | None = None
        self._kinds: tuple[Selection, Selection] | None = None

    def kinds(self) -> tuple[Selection, Selection]:
        """The routes over pairs, and those over aggregated workers; each may be empty. They cannot be narrowed more."""
        if self._kinds is None:
            pairs, aggregated = (Selection(self._pools, whole, self._excluded) for whole in self._whole.kinds())
            self._kinds = pairs, aggregated
        return self._kinds

    @property
    def has_pairs(self) -> bool:
        """Whether any of `streams` may be a decode worker."""
        return self._whole.has_pairs

    @property
    def streams(self) -> Live:
        """Aggregated workers, and decode workers with a compatible prefill worker."""
        if self._streams is None:
            self._streams = self._whole.streams(self._empty).without(
                member for member in self._excluded if member.pool is not None
            )
        return self._streams

    def prefills(self, stream: Worker) -> Live | None:
        """The prefill workers compatible with one of `streams`; None for an aggregated worker."""
        member = self._pools.member(stream.start)
        assert member is not None, "the policy picked a worker that is in no pool"
        assert member.pool is not None, "the policy picked a prefill worker to stream"
        return self._prefills(member.pool)

    def names(self, most: int) -> list[str]:
        """Ids of at most `most` of `streams`, and of as many prefill workers of one pool."""
        shares = self._whole.shares.items()
        pool = next((pool for pool, share in shares if share.prefills is not None and pool not in self._empty), None)
        prefills = None if pool is None else self._prefills(pool)
        return [worker.worker_id for some in (self.streams, prefills or ()) for worker in islice(some, most)]

    def avoiding(self, mark: int) -> Selection:
        """The routes without workers that have a mark; may be empty."""
        narrower = self._pools.whole(self._whole.prompt_tokens, self._whole.avoided | mark)
        return Selection(self._pools, narrower, self._excluded)

    def without(self, starts: Iterable[Start]) -> Selection:
        """The routes without certain workers; may be empty."""
        members = {member: None for start in starts if (member := self._pools.member(start)) is not None}
        more = [member for member in members if member not in self._excluded]
        return Selection(self._pools, self._whole, (*self._excluded, *more)) if more else self

    def _prefills(self, pool: Pool) -> Live | None:
        prefills = self._whole.shares[pool].prefills
        if prefills is None or not self._excluded:
            return prefills
        return prefills.without(member for member in self._excluded if member.pool is None)

    def _subtract(self) -> None:
        """Subtract the routes of excluded workers. Visits only the pools that these belong to."""
        lost: dict[Pool, list[int]] = {}
        for member in self._excluded:
            if member.is_live(self._whole.avoided, self._whole.prompt_tokens):
                for pool in member.pools():
                    lost.setdefault(pool, [0, 0])[member.pool is None] += 1
        for pool, (streams, prefills) in lost.items():
            share = self._whole.shares.get(pool)
            if share is not None:
                peers = 1 if share.prefills is None else len(share.prefills) - prefills
                left = (len(share.streams) - streams) * peers
                self.routes_count += left - share.routes_count
                if not left:
                    self._empty.append(pool)


class Pools:
    """All pools of one model."""

    def __init__(self, model: str, tokenizer_digest: str, explain: Explain = why_none) -> None:
        """`explain` makes the error of a view without a route."""
        self._explain = explain
        self.version = 0
        """Grows with each change, which invalidates every earlier Selection."""
        self.embeds: bool | None = None
        """Whether the model computes embeddings, and generates nothing; None: no worker has said so far."""
        self._model = model
        self._tokenizer_digest = tokenizer_digest
        self._view = KnownView()
        self._workers: tuple[Worker, ...] = ()
        self._members: dict[Start, Member] = {}
        self._pools: dict[tuple[Hashable, ...], Pool] = {}
        """By the keys that their decode workers accept; () for aggregated workers."""
        self._groups: dict[Hashable, Group] = {}
        """Prefill workers by the keys that they offer."""
        self._marked: dict[int, frozenset[Start]] = {mark: frozenset() for mark in (UNHEALTHY, FAILING, REFUSED)}
        self._contexts: list[int] = []
        """Of all members, ascending."""
        self._model_digests = Counter[str]()
        """Members by their weights: more than one key while the model is being changed."""
        self._wholes: dict[tuple[int, int], Whole] = {}
        self._why_none: Callable[[], ServiceError] | None = None
        """Creates the error of this view; None: not computed yet."""

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Apply a new registry view."""
        removed, added = self._view.replace(workers)
        self._workers, self._why_none = workers, None
        # Where workers of one name differ, those that generate serve it: the others would refuse every request for it.
        kinds = {worker.capabilities.embeds for worker in workers if self._knows(worker)}
        if kinds and self.embeds is not (False not in kinds):
            self.embeds = False not in kinds
            removed, added = [member.worker for member in self._members.values()], [*workers]
        for worker in removed:
            member = self._members.pop(worker.start, None)
            if member is not None:
                self._remove(member)
        for worker in added:
            if self._takes(worker):
                self._add(worker)
        self._change()

    def mark(self, mark: int, starts: Collection[Start]) -> None:
        """Replace the set of workers that have a mark. Costs nothing where it is the same frozenset as before."""
        known = self._marked[mark]
        if starts is known:
            return
        now = self._marked[mark] = starts if isinstance(starts, frozenset) else frozenset(starts)
        changed = [member for start in now ^ known if (member := self._members.get(start)) is not None]
        for member in changed:
            member.mark(member.marks ^ mark)
        if changed:
            self._change()

    @property
    def is_mixed(self) -> bool:
        """Whether aggregated workers are members, and workers of pairs, in whatever state."""
        return () in self._pools and (len(self._pools) > 1 or bool(self._groups))

    def has_marked(self, mark: int) -> bool:
        """Whether any worker has a mark."""
        return bool(self._marked[mark])

    def member(self, start: Start) -> Member | None:
        """The member of a worker; None: its model, tokenizer, state or leg contract exclude it."""
        return self._members.get(start)

    def with_other_weights(self, model_digest: str) -> frozenset[Start]:
        """Members whose weights differ. Visits the members only while there are several sets of weights."""
        if self._model_digests.keys() <= {model_digest}:
            return frozenset()
        return frozenset(
            start for start, member in self._members.items() if member.worker.capabilities.model_digest != model_digest
        )

    def rank(self, prompt_tokens: int) -> int:
        """How many members are too small for a prompt: equal for prompts that fit the same workers."""
        return bisect_right(self._contexts, prompt_tokens)

    def selection(self, prompt_tokens: int) -> Selection:
        """The routes that hold a prompt and at least one token more; may be empty."""
        return Selection(self, self.whole(prompt_tokens))

    def whole(self, prompt_tokens: int, avoided: int = 0) -> Whole:
        """The routes of all pools for a prompt and one token more, without workers that have any mark of `avoided`."""
        key = avoided, self.rank(prompt_tokens)
        known = self._wholes.get(key)
        if known is None:
            bound = self._contexts[key[1]] if key[1] < len(self._contexts) else math.inf
            shares = {pool: pool.share(avoided, prompt_tokens, bound) for pool in self._pools.values()}
            shares = {pool: share for pool, share in shares.items() if share.routes_count}
            routes_count = sum(share.routes_count for share in shares.values())
            if len(self._wholes) >= KEPT_MAX:
                self._wholes.clear()
            has_pairs = any(share.prefills is not None for share in shares.values())
            known = self._wholes[key] = Whole(avoided, prompt_tokens, shares, routes_count, has_pairs)
        return known

    def context_tokens_max(self) -> int | None:
        """The most tokens of prompt and completion together that any route can hold; None: there is no route."""
        shares = [share for pool in self._pools.values() if (share := pool.share(0, -1, 0)).routes_count]
        limits = [
            min(share.streams.context_tokens_max, (share.prefills or share.streams).context_tokens_max)
            for share in shares
        ]
        return max(limits, default=None)

    def why_none(self) -> ServiceError:
        """Why there is no route at all."""
        if self._why_none is None:
            self._why_none = self._explain(self._workers, self._model, self._tokenizer_digest)
        return self._why_none()

    def _takes(self, worker: Worker) -> bool:
        return self._knows(worker) and worker.capabilities.embeds is self.embeds

    def _knows(self, worker: Worker) -> bool:
        capabilities = worker.capabilities
        return (
            worker.state is WorkerState.SERVING
            and worker.leg_contract == LEG_CONTRACT
            and capabilities.model == self._model
            and capabilities.tokenizer_digest == self._tokenizer_digest
        )

    def _add(self, worker: Worker) -> None:
        pool: Pool | None = None
        if worker.role is WorkerRole.PREFILL:
            groups = tuple(map(self._group, offered_keys(worker.capabilities)))
        else:
            pool = self._pool(() if worker.role is WorkerRole.AGGREGATED else accepted_keys(worker.capabilities))
            groups = (pool.streams,)
        start = worker.start
        marks = sum(mark for mark, starts in self._marked.items() if start in starts)
        member = self._members[start] = Member(worker, groups, pool, marks)
        insort(self._contexts, member.entry[0])
        self._model_digests[worker.capabilities.model_digest] += 1

    def _remove(self, member: Member) -> None:
        member.leave()
        del self._contexts[bisect_left(self._contexts, member.entry[0])]
        # Subtraction drops counts of zero.
        self._model_digests -= Counter([member.worker.capabilities.model_digest])
        pool, keys = member.pool, tuple[Hashable, ...]()
        if pool is None:
            keys = offered_keys(member.worker.capabilities)
        elif not pool.streams:
            del self._pools[pool.keys]
            keys = pool.keys
            for group in pool.prefills or ():
                group.pools.remove(pool)
        for key in keys:
            group = self._groups[key]
            if not group and not group.pools:
                del self._groups[key]

    def _pool(self, keys: tuple[Hashable, ...]) -> Pool:
        if keys not in self._pools:
            self._pools[keys] = Pool(keys, tuple(map(self._group, keys)) or None)
        return self._pools[keys]

    def _group(self, key: Hashable) -> Group:
        return self._groups.setdefault(key, Group())

    def _change(self) -> None:
        self.version += 1
        self._wholes.clear()
