"""The policy `session`: requests of one session go to one worker, as long as it has no more than its share.

Consistent: rendezvous hashing of the session's key and the worker's id, so all frontends agree, and a worker that comes
or goes moves only its own sessions. Bounded: a worker that has LOAD_BOUND times the mean number of requests is passed
over for the session's next one. Requests without a key are placed by least work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from tandem_frontend.routing.cost_table import CostTable
from tandem_frontend.routing.least_work import LeastWork
from tandem_frontend.routing.policy import Choice, Job, RoutingRequest
from tandem_frontend.routing.pool import Live

LOAD_BOUND = 1.25
HASHES_MAX = 4_096
"""Worker hashes kept; they cost a microsecond each to compute."""
PASSED_MAX = 64
"""Workers that a session is passed on by at most."""
MIX, MASK, SHIFT = 0x9E3779B97F4A7C15, 2**64 - 1, 24
"""Multiplying by an odd constant lets all lower bits change the upper ones, of which the weight is made."""


class Session:
    """Picks the worker of a session."""

    name = "session"

    def __init__(self, tables: Mapping[Job, CostTable], rng: random.Random) -> None:
        self._tables = tables
        self._keyless = LeastWork(tables, rng)
        self._hashes: dict[str, int] = {}

    def choose(self, workers: Live, request: RoutingRequest, job: Job) -> Choice:
        """See `Policy`."""
        key = session_key(request)
        if not key:
            return self._keyless.choose(workers, request, job)
        flat, table = workers.flat(), self._tables[job]
        own = _hash(key)
        weights = [((own ^ value) * MIX & MASK) >> SHIFT for value in self._hashes_of(flat.ids)]
        share = (table.requests_sum + 1) / len(table.rows)
        bound = math.ceil(LOAD_BOUND * share)
        for _ in range(min(len(weights), PASSED_MAX)):
            at = weights.index(max(weights))
            if table.rows[flat.ids[at]].requests + 1 <= bound:
                return Choice(flat.members[at], self.name)
            weights[at] = -1
        # Most of those that may be picked have more than their share: then load alone counts.
        return self._keyless.choose(workers, request, job)._replace(policy=self.name)

    def _hashes_of(self, worker_ids: Sequence[str]) -> list[int]:
        known = self._hashes
        try:
            return [known[worker_id] for worker_id in worker_ids]
        except KeyError:
            if len(known) >= HASHES_MAX:
                known.clear()
            known.update((worker_id, _hash(worker_id)) for worker_id in worker_ids)
            return [known[worker_id] for worker_id in worker_ids]


def session_key(request: RoutingRequest) -> str:
    """What the request is placed by: its session, or else its tenant; empty: neither."""
    # A tenant must not meet a session of the same name.
    return f"s:{request.session}" if request.session else f"t:{request.tenant}" if request.tenant else ""


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
