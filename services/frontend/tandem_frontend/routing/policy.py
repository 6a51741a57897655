"""What a policy is: the choice of one worker among those that are equally good for a request.

Owns the seam only. What may be chosen is `pools`', in which order workers are avoided `routes`'.
"""

from __future__ import annotations

from typing import Protocol

from tandem.domain.worker import Worker
from tandem_frontend.routing.pool import Live


class Policy(Protocol):
    """Chooses a worker. For a pair it is asked twice: for the one that streams, then for a prefill worker that fits."""

    @property
    def name(self) -> str:
        """For traces."""
        ...

    def choose(self, workers: Live) -> Worker:
        """One of the workers, at least one, all of one of those two kinds; they may not be kept.

        A look at one of them by its index costs the same however many there are; one at all of them does not.
        """
        ...
