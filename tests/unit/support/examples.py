"""How many examples a property is tested with: all of them in `make test`, a quarter while someone works."""

from __future__ import annotations

import os

IS_FULL = os.environ.get("HYPOTHESIS_EXAMPLES") == "full"


def examples(full_count: int) -> int:
    """The number of examples of this run; `full_count` are enough to find what the property is there for."""
    return full_count if IS_FULL else max(10, full_count // 4)
