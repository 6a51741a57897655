"""The interface of a routing policy: it picks one worker among those that are equally preferred for a request.

Owns the interface only. `pools` knows which workers are possible, `router` which of them are preferred.
"""

from __future__ import annotations

from typing import Protocol

from tandem.domain.worker import Worker
from tandem_frontend.routing.pool import Live


class Policy(Protocol):
    """Picks workers. For a pair it is called twice: for the decode worker, then for a compatible prefill worker."""

    @property
    def name(self) -> str:
        """For traces."""
        ...

    def choose(self, workers: Live) -> Worker:
        """Pick one of `workers`, which is never empty, and must not be kept after the call.

        Indexing takes constant time in any fleet; iterating over all workers does not.
        """
        ...
