"""One measurement after the other: a system is started, asked by clients, and looked at for one window.

Owns the order, warm-ups, and the repetition of windows in which the rest of the machine was busy.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.children import Helper, StartError, own_python
from benchmarks.peers.clocks import Spent, look, rss_bytes, tree
from benchmarks.peers.figures import Figures, is_quiet, summarise
from benchmarks.peers.load.streams import Plan
from benchmarks.peers.scenarios import Scenario
from benchmarks.peers.systems.door import PACKAGES, Door, Running, Surroundings, System
from benchmarks.peers.words import Words

LOOK_S = 1.0


@dataclass(frozen=True)
class Settings:
    """How long and how often."""

    model: Path
    seconds: float = 8.0
    repeats: int = 4
    """Windows that may be measured again."""
    connections: int = 16
    settle_s: float = 1.0
    patience_s: float = 60.0
    """How long a window may wait for the machine to rest."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    scenario: str
    system: str
    streams: int
    workers: int
    figures: Figures | None
    problem: str = ""
    """Why there are no figures."""
    memory_bytes: tuple[int, int] | None = None
    """What the streams' opening added to the front and to what stands before it; of one stream."""
    lost: int = 0
    """Streams that broke since the first one was opened."""
    windows: int = 1
    """How many were measured until one was quiet."""

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        figures = None if self.figures is None else self.figures.to_json()
        return {**{name: value for name, value in asdict(self).items() if name != "figures"}, "figures": figures}


Report = Callable[[Row], None]


async def run_all(scenarios: Sequence[Scenario], systems: Sequence[System], settings: Settings, report: Report) -> None:
    """Everything, in order: for each scenario all systems, one at a time."""
    words = Words.of_model(settings.model)
    for scenario in scenarios:
        for prefill, decode in scenario.workers:
            for system in systems:
                await _run_system(scenario, system, (prefill, decode), settings, words, report)


async def _run_system(
    scenario: Scenario, system: System, workers: tuple[int, int], settings: Settings, words: Words, report: Report
) -> None:
    """One system, started anew for each number of streams: what one load has left behind is not the next one's."""
    for streams in scenario.streams:
        done, is_over = 0, False
        while not is_over:
            logs = Path(tempfile.mkdtemp(prefix=f"peers-{system.name.replace(' ', '-')}-"))
            around = Surroundings(settings.model, words, scenario.pace, *workers, logs, streams)
            rows: list[Row] = []
            is_over = await _run_doors(scenario, system, around, settings, done, rows.append, report)
            done += len(rows)
            if any(row.problem for row in rows):
                print(f"logs: {logs}", file=sys.stderr)
            else:
                shutil.rmtree(logs)


async def _run_doors(
    scenario: Scenario, system: System, around: Surroundings, settings: Settings, done: int, *reports: Report
) -> bool:
    """The doors of a system from number `done` on, or the next one alone where each is to have a fresh system.

    Returns whether those were the last doors.
    """

    def report(row: Row) -> None:
        for one in reports:
            one(row)

    try:
        async with system.start(around) as serving:
            doors = serving.doors[done : done + 1] if scenario.is_of_memory else serving.doors
            for door in doors:
                report(await _measure(scenario, serving, door, around, settings))
            return done + len(doors) >= len(serving.doors)
    except StartError as problem:
        workers = around.prefill + around.decode
        report(Row(scenario.name, system.name, around.streams_max, workers, None, str(problem)))
        return True


async def _measure(scenario: Scenario, serving: Running, door: Door, around: Surroundings, settings: Settings) -> Row:
    """One door, one number of streams."""
    plan = Plan(
        door=door.kind,
        addresses=door.addresses,
        model=around.model_name,
        streams=around.streams_max,
        max_tokens=scenario.max_tokens,
        ramp_s=scenario.ramp_s(around.streams_max),
        words={"texts": around.words.texts, "ids": around.words.ids},
        connections=settings.connections,
        **door.options,
    )
    clients = Helper("clients", "benchmarks.peers.load", around.logs, own_python(), PACKAGES)
    workers = around.prefill + around.decode
    try:
        problem = (await clients.start(asdict(plan)))["problem"]
        if problem:
            why = f"never answered whole: {problem}"
            return Row(scenario.name, door.system, around.streams_max, workers, None, why)
        return await _Measurement(scenario, serving, door, clients, around.streams_max, workers, settings).run()
    finally:
        await clients.stop()


class _Measurement:
    """The windows of one row."""

    def __init__(
        self,
        scenario: Scenario,
        serving: Running,
        door: Door,
        clients: Helper,
        streams: int,
        workers: int,
        settings: Settings,
    ) -> None:
        self._scenario = scenario
        self._serving = serving
        self._door = door
        self._clients = clients
        self._streams = streams
        self._workers = workers
        self._settings = settings

    async def run(self) -> Row:
        """Open the streams, warm up, measure until a window is quiet or patience ends."""
        await asyncio.sleep(self._settings.settle_s)
        before = self._memory()
        await self._clients.ask({"do": "start"})
        await asyncio.sleep(self._scenario.warm_s)
        windows: list[Figures] = []
        while len(windows) <= self._settings.repeats and not any(figures.is_quiet for figures in windows):
            await self._wait_quiet()
            windows.append(await self._window())
        grown = [now - then for now, then in zip(self._memory(), before, strict=True)]
        clients = await self._clients.ask({"do": "clock"})
        return Row(
            self._scenario.name,
            self._door.system,
            self._streams,
            self._workers,
            min(windows, key=lambda figures: figures.others_cores),
            memory_bytes=(grown[0] // self._streams, grown[1] // self._streams),
            lost=clients["failed"],
            windows=len(windows),
        )

    async def _wait_quiet(self) -> None:
        """Return when the rest of the machine rests, or patience ends; a window begun before that is wasted."""
        before = look(self._door.parts)
        until_s = before.at_s + self._settings.patience_s
        while before.at_s < until_s:
            await asyncio.sleep(LOOK_S)
            after = look(self._door.parts)
            if is_quiet(Spent.between(before, after)):
                return
            before = after

    def _memory(self) -> tuple[int, int]:
        return rss_bytes(tree(self._door.parts.front)), rss_bytes(tree(self._door.parts.proxy))

    async def _window(self) -> Figures:
        """One window."""
        parts, fleet = self._door.parts, self._serving.fleet
        if fleet is not None:
            await fleet.ask({})
        clients_s = (await self._clients.ask({"do": "clock"}))["process_s"]
        before = look(parts)
        await asyncio.sleep(self._settings.seconds)
        after = look(parts)
        clients_s = (await self._clients.ask({"do": "clock"}))["process_s"] - clients_s
        waits = [] if fleet is None else (await fleet.ask({}))["waits"]
        seen = await self._clients.ask({"do": "window", "begin_s": before.at_s, "end_s": after.at_s})
        spent = Spent.between(before, after)
        return summarise(spent, seen, waits, clients_s, has_proxy=bool(parts.proxy))
