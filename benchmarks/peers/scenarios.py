"""Named scenarios: each a token rate of the workers, a response length and numbers of streams.

`running.py` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.peers.workers.steps import Pace

ENGINE_STEP_S = 0.01


@dataclass(frozen=True)
class Scenario:
    """One kind of load on all systems, and the table that it makes."""

    name: str
    title: str
    pace: Pace
    max_tokens: int
    streams: tuple[int, ...]
    table: str
    """Which columns: tokens, requests, open or fleet."""
    workers: tuple[tuple[int, int], ...] = ((1, 2),)
    """Numbers of prefill and decode workers, one after the other."""
    open_rate: float | None = None
    """Streams opened in a second; None: all within the time of one answer."""
    warm_s: float = 2.0

    @property
    def is_of_memory(self) -> bool:
        """Whether each door is measured on a system that has just been started: memory once used is used again."""
        return self.table == "open"

    def ramp_s(self, streams: int) -> float:
        """From the first stream's start to the last one's: so long that ends do not come all at once."""
        if self.open_rate is not None:
            return streams / self.open_rate
        return max(0.2, min(5.0, self.pace.answer_s(self.max_tokens)))


PACED = Scenario(
    name="paced",
    title="a token each 10 ms",
    pace=Pace(0.01),
    max_tokens=128,
    streams=(1, 8, 64, 256),
    table="tokens",
)
FAST = Scenario(name="fast", title="a token each 1 ms", pace=Pace(0.001), max_tokens=128, streams=(64,), table="tokens")
SHORT = Scenario(
    name="short", title="one token out", pace=Pace(0.0), max_tokens=1, streams=(1, 8, 64), table="requests"
)
SLOW = Scenario(
    name="slow",
    title="open streams, a token each 500 ms",
    pace=Pace(0.5, step_s=ENGINE_STEP_S),
    max_tokens=1500,
    streams=(1000, 5000),
    table="open",
    open_rate=200.0,
)
FLEET = Scenario(
    name="fleet",
    title="one token out, by the size of the fleet",
    pace=Pace(0.0),
    max_tokens=1,
    streams=(1,),
    table="fleet",
    workers=((1, 1), (32, 32), (256, 256)),
)
SCENARIOS = {scenario.name: scenario for scenario in (PACED, FAST, SHORT, SLOW, FLEET)}


def chosen(names: list[str], streams: dict[str, tuple[int, ...]]) -> list[Scenario]:
    """Scenarios by name, with other numbers of streams where they are given.

    Raises:
        KeyError: there is no such scenario.
    """
    return [replace(SCENARIOS[name], streams=streams[name]) if name in streams else SCENARIOS[name] for name in names]
