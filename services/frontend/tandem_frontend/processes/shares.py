"""What each process of a frontend gets of what the frontend as a whole may do.

Pure. Only the bound on open requests is divided: rooms with the workers need no share, because each process is one
frontend among others to `capacity`, and clients' rates are the edge's.
"""

from __future__ import annotations

from tandem_frontend.config import FrontendConfig


def share(total: int, number: int, count: int) -> int:
    """The part of process `number` of `count`: as even as can be, and what remains for the first ones."""
    return total // count + (number < total % count)


def settings_of(config: FrontendConfig, number: int) -> FrontendConfig:
    """The settings of one process: its share, and nothing that is the parent's alone."""
    own = share(config.open_requests_max, number, config.processes)
    return config.model_copy(update={"open_requests_max": own, "processes": 1, "announce_file": None})
