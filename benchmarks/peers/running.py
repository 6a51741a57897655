"""Runs one measurement after another: starts a system, puts load on it, and measures one window.

Owns the order, warm-ups, and the repetition of windows in which the rest of the machine was busy.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.children import Helper, StartError, own_python
from benchmarks.peers.clocks import Spent, look, rss_bytes, tree
from benchmarks.peers.load.streams import Plan
from benchmarks.peers.measurements import Measurements, is_quiet, summarise
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
    """How long a measurement waits for the machine to rest."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    scenario: str
    system: str
    streams: int
    workers: int
    measurements: Measurements | None
    problem: str = ""
    """Why there are no measurements."""
    memory_bytes: tuple[int, int] | None = None
    """What the streams' opening added to the front and to what stands before it; of one stream."""
    lost: int = 0
    """Streams that broke since the first one was opened."""
    windows: int = 1
    """How many were measured until one was quiet."""

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        measurements = None if self.measurements is None else self.measurements.to_json()
        return {
            **{name: value for name, value in asdict(self).items() if name != "measurements"},
            "measurements": measurements,
        }


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
    """One door, one number of streams: windows until one is quiet or patience ends, each with clients of its own."""
    rows: list[Row] = []
    while len(rows) <= settings.repeats:
        # Before the streams are opened: a load that waits for others to rest would keep them from it.
        await _wait_quiet(door, settings.patience_s)
        row = await _attempt(scenario, serving, door, around, settings)
        if row.measurements is None:
            return row
        rows.append(row)
        if row.measurements.is_quiet:
            break
    best = min(rows, key=lambda row: row.measurements.others_cores if row.measurements else 0.0)
    # What the first streams took is used again by those that come after them.
    return replace(best, memory_bytes=rows[0].memory_bytes, windows=len(rows))


async def _wait_quiet(door: Door, patience_s: float) -> None:
    """Return when the rest of the machine rests, or patience ends."""
    before = look(door.parts)
    until_s = before.at_s + patience_s
    while before.at_s < until_s:
        await asyncio.sleep(LOOK_S)
        after = look(door.parts)
        if is_quiet(Spent.between(before, after)):
            return
        before = after


async def _attempt(scenario: Scenario, serving: Running, door: Door, around: Surroundings, settings: Settings) -> Row:
    """Clients from their start to their end, and a window between."""
    streams, workers = around.streams_max, around.prefill + around.decode
    plan = Plan(
        door=door.kind,
        addresses=door.addresses,
        model=around.model_name,
        streams=streams,
        max_tokens=scenario.max_tokens,
        ramp_s=scenario.ramp_s(streams),
        words={"texts": around.words.texts, "ids": around.words.ids},
        connections=settings.connections,
        **door.options,
    )
    clients = Helper("clients", "benchmarks.peers.load", around.logs, own_python(), PACKAGES)
    try:
        problem = (await clients.start(asdict(plan)))["problem"]
        if problem:
            return Row(scenario.name, door.system, streams, workers, None, f"never answered whole: {problem}")
        await asyncio.sleep(settings.settle_s)
        before = _memory(door)
        await clients.ask({"do": "start"})
        await asyncio.sleep(scenario.warm_s)
        measurements = await _window(serving, door, clients, settings.seconds)
        grown = [(now - then) // streams for now, then in zip(_memory(door), before, strict=True)]
        lost = (await clients.ask({"do": "clock"}))["failed"]
        return Row(scenario.name, door.system, streams, workers, measurements, "", (grown[0], grown[1]), lost)
    finally:
        await clients.stop()


def _memory(door: Door) -> tuple[int, int]:
    return rss_bytes(tree(door.parts.front)), rss_bytes(tree(door.parts.proxy))


async def _window(serving: Running, door: Door, clients: Helper, seconds: float) -> Measurements:
    """One window."""
    fleet = serving.fleet
    if fleet is not None:
        await fleet.ask({})
    clients_s = (await clients.ask({"do": "clock"}))["process_s"]
    before = look(door.parts)
    await asyncio.sleep(seconds)
    after = look(door.parts)
    clients_s = (await clients.ask({"do": "clock"}))["process_s"] - clients_s
    waits = [] if fleet is None else (await fleet.ask({}))["waits"]
    seen = await clients.ask({"do": "window", "begin_s": before.at_s, "end_s": after.at_s})
    return summarise(Spent.between(before, after), seen, waits, clients_s, has_proxy=bool(door.parts.proxy))
