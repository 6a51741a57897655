"""The controller's rule on virtual time, against every static fleet and against plans that know the load in advance.

python -m benchmarks.replay.role_controller ramp      # 1 to 24 requests a second and back within 900 s
python -m benchmarks.replay.role_controller flip      # long prompts, then long answers

The rule is the process's own class (`tandem.controller.rule.RoleRule`), with its default settings; requests, routing,
queues and engines are those of `tandem replay`. A change drains as long as the longest answer takes, then 0.5 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_frontend.replay.fleet_file import FleetFile, parse_fleet
from tandem_frontend.replay.frontend import FINISHED
from tandem_frontend.replay.role_changes import ControllerSteering, RoleChange, ScheduledSteering, Steering
from tandem_frontend.replay.simulation import Replay, replay
from tandem_frontend.replay.trace import TracedRequest

from tandem.controller.settings import rule_settings
from tandem.domain.worker import WorkerRole

BLOCK_TOKENS = 512
Shape = tuple[float, int, int]
"""Seconds of arrival, prompt tokens, answer tokens."""
Split = tuple[int, int, int]
"""Prefill, decode and aggregated workers."""
ENGINE = {
    "prefill_tokens_per_s": 24_000,
    "decode_step_s": 0.008,
    "decode_request_s": 0.0001,
    "decode_context_token_s": 2e-9,
    "transfer_latency_s": 0.001,
    "transfer_bytes_per_s": 50e9,
    "jitter": 0.02,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load, goals, and where the controller begins."""

    requests: tuple[Shape, ...]
    ttft_s: float
    itl_s: float
    workers: int
    starts: tuple[int, ...]
    """Numbers of prefill workers with which the controller begins."""
    planned: tuple[tuple[float, int], ...]
    """A plan that knows the load: (seconds, prefill workers from then on); the first one is the fleet at the begin."""
    flip_s: float
    """When the load changes at once; 0: it does not."""


def ramp(seed: int) -> Scenario:
    """One period of a sine between 1 and 24 requests a second, 900 s long; 4,000 prompt and 400 answer tokens."""
    rng, period_s, least, most = random.Random(seed), 900.0, 1.0, 24.0
    requests, at_s = list[Shape](), 0.0
    while (at_s := at_s + rng.expovariate(most)) < period_s:
        rate = least + (most - least) * (1 - math.cos(2 * math.pi * at_s / period_s)) / 2
        if rng.random() < rate / most:
            requests.append((at_s, 4_000, 400))
    return Scenario(
        requests=tuple(requests), ttft_s=3.0, itl_s=0.030, workers=7, starts=(1, 3, 6), planned=((0.0, 5),), flip_s=0.0
    )


def flip(seed: int) -> Scenario:
    """400 s of prompts of 8,000 and answers of 100 tokens, then 400 s of prompts of 1,000 and answers of 2,400."""
    rng, flip_s, end_s, at_s = random.Random(seed), 400.0, 800.0, 0.0
    requests = list[Shape]()
    while at_s < end_s:
        rate, prompt, answer = (15.0, 8_000, 100) if at_s < flip_s else (11.0, 1_000, 2_400)
        requests.append(
            (at_s, max(64, round(rng.gauss(prompt, prompt / 5))), max(2, round(rng.gauss(answer, answer / 5))))
        )
        at_s += rng.expovariate(rate)
    return Scenario(
        requests=tuple(requests), ttft_s=2.0, itl_s=0.020, workers=8, starts=(6, 4, 2), planned=((0.0, 6), (400.0, 1)),
        flip_s=flip_s,
    )  # fmt: skip


def fleet_of(split: Split) -> FleetFile:
    """Workers of one kind, in some roles."""
    prefill, decode, aggregated = split
    return parse_fleet(
        {
            "block_tokens": BLOCK_TOKENS,
            "prefill": {"count": prefill, "cache_blocks": 1500},
            "decode": {"count": decode, "kv_capacity_tokens": 1500 * BLOCK_TOKENS, "running_requests_max": 256},
            "aggregated": {"count": aggregated, "cache_blocks": 1500, "running_requests_max": 256},
            "engine": ENGINE,
        }
    )


def trace_of(scenario: Scenario) -> list[TracedRequest]:
    """Prompts that share nothing."""
    ids = itertools.count()
    return [
        TracedRequest(number, at_s, prompt, answer, tuple(next(ids) for _ in range(-(-prompt // BLOCK_TOKENS))))
        for number, (at_s, prompt, answer) in enumerate(scenario.requests)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a fleet did with a load."""

    name: str
    within: float
    """Share of the requests within both goals: the goodput, as all fleets get the same requests."""
    failed: int
    changes: tuple[RoleChange, ...] = ()
    held: dict[str, int] | None = None
    """Decisions by reason."""

    def reversals(self, flip_s: float) -> int:
        """The most changes of direction within one step of the load."""
        steps = [[one.role for one in self.changes if (one.begin_s >= flip_s) is late] for late in (False, True)]
        return max(sum(a is not b for a, b in itertools.pairwise(step)) for step in steps)


def outcome_of(name: str, scenario: Scenario, done: Replay, held: dict[str, int] | None = None) -> Outcome:
    """The figures of a replay."""
    within = [
        one.outcome == FINISHED and one.ttft_s <= scenario.ttft_s and one.itl_s <= scenario.itl_s for one in done.served
    ]
    failed = sum(one.outcome != FINISHED for one in done.served)
    return Outcome(
        name=name, within=sum(within) / len(within), failed=failed, changes=done.role_changes, held=held
    )  # fmt: skip


def played(scenario: Scenario, split: Split, seed: int, name: str, steering: Steering | None = None) -> Outcome:
    """One replay."""
    fleet = fleet_of(split)
    done = replay(fleet, fleet.options(), trace_of(scenario), "auto", seed, steering=steering)
    held = None
    if isinstance(steering, ControllerSteering):
        held = dict(Counter(decision.why.value for _, decision in steering.decisions))
    return outcome_of(name, scenario, done, held)


def controlled(scenario: Scenario, prefill: int, seed: int) -> Outcome:
    """The controller's rule, from a fleet with so many prefill workers on."""
    steering = ControllerSteering(rule_settings(ttft_s=scenario.ttft_s, itl_s=scenario.itl_s))
    split = (prefill, scenario.workers - prefill, 0)
    return played(scenario, split, seed, f"controller, from {_text(split)}", steering)


def planned(scenario: Scenario, seed: int) -> Outcome:
    """The plan that knows the load."""
    (_, first), *later = scenario.planned
    split = (first, scenario.workers - first, 0)
    words = ", ".join(f"{count} prefill from {at_s:g} s on" for at_s, count in scenario.planned)
    return played(scenario, split, seed, f"known in advance: {words}", ScheduledSteering(later))


def statics(workers: int, *, mixed: bool) -> Iterator[Split]:
    """All fleets of one size; without `mixed` those of pairs alone and of aggregated workers alone."""
    for aggregated in range(workers + 1):
        for prefill in range(workers - aggregated + 1):
            split = (prefill, workers - aggregated - prefill, aggregated)
            has_pairs = prefill > 0 and split[1] > 0
            if aggregated == workers or (has_pairs and (mixed or not aggregated)):
                yield split


def _text(split: Split) -> str:
    return " + ".join(f"{n} {role.value}" for n, role in zip(split, (*_ROLES,), strict=True) if n)


_ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.AGGREGATED)


def _row(one: Outcome, flip_s: float) -> str:
    changes = f", {len(one.changes)} changes, {one.reversals(flip_s)} reversals" if one.held is not None else ""
    return f"{one.name}: {one.within:.1%} within both goals, {one.failed} failed{changes}"


def _json(outcomes: Sequence[Outcome], flip_s: float) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "within": one.within,
            "failed": one.failed,
            "reversals": one.reversals(flip_s),
            "decisions": one.held,
            "changes": [
                {"worker": c.worker_id, "role": c.role.value, "begin_s": c.begin_s, "end_s": c.end_s, "reason": c.words}
                for c in one.changes
            ],
        }
        for one in outcomes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("ramp", "flip"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fleets", choices=("none", "pure", "mixed"), default="pure", help="static fleets to compare")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--changes", action="store_true", help="print each change with its reason")
    asked = parser.parse_args()
    scenario = ramp(asked.seed) if asked.load == "ramp" else flip(asked.seed)
    outcomes: list[Outcome] = []

    def note(one: Outcome) -> None:
        outcomes.append(one)
        print(_row(one, scenario.flip_s), flush=True)
        for change in one.changes if asked.changes and one.held is not None else ():
            print(f"  {change.begin_s:7.1f} to {change.end_s:7.1f} s: {change.words}", flush=True)

    for prefill in scenario.starts:
        note(controlled(scenario, prefill, asked.seed))
    note(planned(scenario, asked.seed))
    for split in () if asked.fleets == "none" else statics(scenario.workers, mixed=asked.fleets == "mixed"):
        note(played(scenario, split, asked.seed, f"static: {_text(split)}"))
    fixed = [one.within for one in outcomes if one.name.startswith("static")]
    if fixed:
        worst = min(one.within for one in outcomes if one.held is not None)
        print(f"worst start of the controller over the best static fleet: {worst / max(fixed):.2f}")
    if asked.json:
        asked.json.write_text(json.dumps(_json(outcomes, scenario.flip_s), indent=2) + "\n")


if __name__ == "__main__":
    main()
