"""Runs the scenarios on one fleet and prints a line for each; exits with status 1 if one has failed."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from benchmarks.scorecard.fleet import Fleet, fleet
from benchmarks.scorecard.scenarios import SCENARIOS, SLACK_S, Scenario


async def score(fleet: Fleet, scenario: Scenario) -> bool:
    """Run one scenario, print its line, and restore the fleet. Returns whether it has passed."""
    try:
        found = await scenario.run(fleet)
    except AssertionError as problem:
        print(f"FAIL  {scenario.name:<36} {problem}", flush=True)
        await fleet.restore()
        return False
    passed = found.failed <= scenario.failed_max and found.time_s <= scenario.bound_s + SLACK_S
    note = f"; {found.note}" if found.note else ""
    print(
        f"{'pass' if passed else 'FAIL'}  {scenario.name:<36} {found.failed} wrong  {found.time_s:6.2f} s of "
        f"{scenario.bound_s:4.1f} s  {found.what}{note}",
        flush=True,
    )
    await fleet.restore()
    return passed


async def run(names: str, seed: int) -> int:
    """Run the scenarios whose name contains the text. Returns how many have failed."""
    chosen = [scenario for scenario in SCENARIOS if names in scenario.name]
    with tempfile.TemporaryDirectory() as logs:
        async with fleet(Path(logs), seed) as cluster:
            await cluster.restore()
            results = [await score(cluster, scenario) for scenario in chosen]
    print(f"{sum(results)} of {len(results)} scenarios passed")
    return len(results) - sum(results)


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scorecard", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="scenarios whose name contains it")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    return min(1, asyncio.run(run(given.only, given.seed)))


if __name__ == "__main__":
    sys.exit(main())
