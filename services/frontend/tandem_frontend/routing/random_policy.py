"""The simplest policy: each worker as often as any other. Knows no load.

With one choice among all that stream and then one among the prefill workers that fit, requests are spread evenly over
those that stream, because that is where a request stays longest.
"""

from __future__ import annotations

import random

from tandem.domain.worker import Worker
from tandem_frontend.routing.pool import Live


class RandomPolicy:
    """Draws a worker."""

    name = "random"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, workers: Live) -> Worker:
        """Any of them."""
        return self._rng.choice(workers)
