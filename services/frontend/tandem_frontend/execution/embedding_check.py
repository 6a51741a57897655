"""Checks the embedding in the finish of a leg: no client gets a vector of another size, or one that is no vector.

Pure. `attempt` calls it before the leg counts as finished, so that another worker is tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def fault_in_embedding(values: Sequence[float], size: int) -> str | None:
    """What is wrong with an embedding that must have `size` numbers (0: there must be none); None: nothing."""
    if len(values) != size:
        return f"received an embedding of {len(values)} numbers, not {size}"
    # A sum is finite where each number is: NaN and infinity remain, and it runs in C.
    if size and not math.isfinite(math.fsum(map(abs, values))):
        return "received an embedding with a number that is not finite"
    return None
