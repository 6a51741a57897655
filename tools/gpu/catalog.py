"""The steps that need several workers: the fleets each is for, and what it is with fewer GPUs.

Pure. A step that has no fleet for the GPUs that are there is not run, and the results say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.gpu.shapes import Fleet, fleets_of

GPUS = 4
"""What the steps are made for."""
FLEET = "fleet_"
PLANNED = "fleet_planned"
GROUP = "several"
"""As a name in `--steps`: all steps of this module, the fleets of the GPUs that are there only."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step."""

    name: str
    fleets: tuple[Fleet, ...]
    """The one it is made for, then what takes its place with fewer GPUs."""

    def fleet(self, gpus: int) -> Fleet | None:
        """The first that so many GPUs are enough for; None: the step cannot be run."""
        return next((fleet for fleet in self.fleets if fleet.gpus <= gpus), None)

    @property
    def gpus(self) -> int:
        """GPUs of the fleet it is made for."""
        return self.fleets[0].gpus

    @property
    def gpus_least(self) -> int:
        """GPUs of the smallest fleet."""
        return min(fleet.gpus for fleet in self.fleets)


TWO_AGGREGATED = Fleet(aggregated=2)
OTHERS = (
    Step("chats", (Fleet(2, 2), Fleet(2, 1), TWO_AGGREGATED)),
    Step("kill_decode_of_two", (Fleet(2, 2), Fleet(1, 2), TWO_AGGREGATED)),
    Step("kill_prefill_of_two", (Fleet(2, 2), Fleet(2, 1))),
    Step("rolling_restart", (Fleet(2, 2), TWO_AGGREGATED)),
    Step("tp2", (Fleet(1, 1, prefill_tp=2, tp=2), Fleet(aggregated=1, tp=2))),
    Step("tp2_refused", (Fleet(1, 1, prefill_tp=2, tp=1),)),
)


def steps(gpus: int) -> tuple[Step, ...]:
    """All steps in the order of running: the fleets of four GPUs and of those that are there, then the others."""
    fleets = dict.fromkeys((*fleets_of(GPUS), *fleets_of(gpus)))
    return (*(Step(FLEET + fleet.name, (fleet,)) for fleet in fleets), *OTHERS)


def group(gpus: int) -> tuple[str, ...]:
    """Names of the steps that `several` stands for."""
    compared = [FLEET + fleet.name for fleet in fleets_of(gpus)]
    return (*compared, PLANNED, *(step.name for step in OTHERS))


def named(name: str, gpus: int) -> Step | None:
    """The step of that name; None: it is none of these. A fleet may be any, as `fleet_3p1d`."""
    for step in steps(gpus):
        if step.name == name:
            return step
    if name.startswith(FLEET) and name != PLANNED:
        return Step(name, (Fleet.named(name.removeprefix(FLEET)),))
    return None


def knows(name: str, gpus: int) -> bool:
    """Whether it is a step of this module."""
    try:
        return name == PLANNED or named(name, gpus) is not None
    except ValueError:
        return False


def shortage(step: Step, gpus: int) -> str:
    """Why the step cannot be run."""
    return f"needs {step.gpus_least} GPUs, and {gpus} are used"


def outlook(gpus: int) -> list[dict[str, Any]]:
    """What each step is with so many GPUs."""
    rows: list[dict[str, Any]] = []
    for step in steps(gpus):
        fleet = step.fleet(gpus)
        if fleet is None:
            said = f"not run: {shortage(step, gpus)}"
        elif fleet == step.fleets[0]:
            said = "runs"
        else:
            said = f"runs smaller; as made for it needs {step.gpus} GPUs"
        rows.append({"step": step.name, "fleet": fleet.name if fleet else step.fleets[0].name, "outlook": said})
    return rows
