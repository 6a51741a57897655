"""The interface of a measured system: endpoints for clients, workers that record their own times, and processes.

Owns these types and the fake workers behind every system. Each system's own module starts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.children import Helper, own_python
from benchmarks.peers.clocks import Parts
from benchmarks.peers.environment import REPOSITORY
from benchmarks.peers.words import Words
from benchmarks.peers.workers.steps import Pace

PACKAGES = [
    REPOSITORY,
    REPOSITORY / "src",
    *(REPOSITORY / "services" / name for name in ("frontend", "prefill", "decode", "registry")),
]


@dataclass(frozen=True)
class Door:
    """One way into a running system."""

    system: str
    """As the tables name it."""
    kind: str
    """grpc, http, contract1 or contract2: what the clients speak."""
    addresses: list[str]
    parts: Parts
    options: dict[str, Any] = field(default_factory=dict)
    """More of the clients' plan."""


@dataclass(frozen=True)
class Running:
    """A system that serves."""

    doors: list[Door]
    fleet: Helper | None
    """Its fake workers; None where the system brings its own."""


@dataclass(frozen=True)
class Surroundings:
    """What a system is started with."""

    model: Path
    words: Words
    pace: Pace
    prefill: int
    decode: int
    logs: Path
    streams_max: int
    """The most streams that will be open at a time."""

    @property
    def model_name(self) -> str:
        """Name clients ask for."""
        return self.model.name


class System(Protocol):
    """A system that can be measured."""

    @property
    def name(self) -> str:
        """As the options name it."""

    def start(self, around: Surroundings) -> contextlib.AbstractAsyncContextManager[Running]:
        """Serve for as long as the block lasts.

        Raises:
            StartError: it does not start.
        """


@dataclass(frozen=True)
class Fleet:
    """Fake workers that serve."""

    helper: Helper
    ports: dict[str, list[int]]
    starts: dict[str, int]


@contextlib.asynccontextmanager
async def fleet(
    kind: str, around: Surroundings, *, python: Path | None = None, registry: str = ""
) -> AsyncIterator[Fleet]:
    """Fake workers of a kind for as long as the block lasts."""
    packages = PACKAGES if python is None else [REPOSITORY]
    helper = Helper(f"workers-{kind}", "benchmarks.peers.workers", around.logs, python or own_python(), packages)
    options = {
        "kind": kind,
        "model": str(around.model),
        "model_name": around.model_name,
        "prefill": around.prefill,
        "decode": around.decode,
        "pace": asdict(around.pace),
        "words": {"texts": around.words.texts, "ids": around.words.ids},
        "registry": registry,
    }
    try:
        said = await helper.start(options)
        yield Fleet(helper, said["ports"], said["starts"])
    finally:
        await helper.stop()
