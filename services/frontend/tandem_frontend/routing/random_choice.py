"""The simplest policy: any worker that can stream the answer, then any prefill worker that fits it.

Spreads evenly over those that stream, because that is where a request stays longest. Knows no load.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tandem_frontend.routing.candidates import Candidate, Route

POLICY = "random"
"""Its name, for whoever asks how a worker was chosen."""


def choose(candidates: Sequence[Candidate], rng: random.Random) -> Route:
    """One of the candidates."""
    chosen = rng.choice(candidates)
    return Route(decode=chosen.decode, prefill=rng.choice(chosen.prefills) if chosen.prefills else None)
