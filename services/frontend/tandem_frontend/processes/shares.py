"""Divides a frontend's limits among its processes.

Pure. Only the open-requests limit is divided: `capacity` treats each process as a frontend of its own, so that the
workers' capacity needs no division, and the edge limits the rates of clients.
"""

from __future__ import annotations

from tandem_frontend.config import FrontendConfig


def share(total: int, number: int, count: int) -> int:
    """The share of process `number` of `count`: as even as possible; the first ones get the remainder."""
    return total // count + (number < total % count)


def settings_of(config: FrontendConfig, number: int) -> FrontendConfig:
    """The settings of one child: its share of the limit, without what only the parent does."""
    own = share(config.open_requests_max, number, config.processes)
    return config.model_copy(update={"open_requests_max": own, "processes": 1, "announce_file": None})
