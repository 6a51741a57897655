"""The command `tandem doctor`: runs the probes of the asked parts at the same time and prints their findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.text import Text

from tandem.cli.doctor import engines, programs
from tandem.cli.doctor.findings import Finding, State, as_json, is_ready
from tandem.cli.doctor.machine import Machine
from tandem.errors import ConfigError

Probe = Callable[[Machine], Iterator[Finding]]

PARTS: dict[str, tuple[str, Probe]] = {
    "cpu": ("engine on the CPU", engines.cpu),
    "gpu": ("engine on GPUs", engines.gpu),
    "edge": ("HTTP edge", programs.edge),
    "consul": ("membership in Consul", programs.consul),
    "containers": ("containers", programs.containers),
}
STYLES = {State.OK: "green", State.UNTESTED: "yellow", State.WRONG: "red", State.MISSING: "red"}
NAME_COLUMNS = 14


def doctor(asked: Iterable[str], machine: Machine, console: Console, *, json_only: bool) -> int:
    """Print what the asked parts need and have; all parts if none is asked.

    Returns the exit status: 0 if every asked part can run, or none was asked; 1 otherwise.

    Raises:
        ConfigError: there is no such part.
    """
    named = list(dict.fromkeys(asked))
    for part in named:
        if part not in PARTS:
            raise ConfigError("PART", f"must be one of {', '.join(PARTS)}, not {part!r}")
    found = examine(named or list(PARTS), machine)
    if json_only:
        print(json.dumps(as_json(found), indent=2))
    else:
        for part, findings in found.items():
            _print_part(part, findings, console)
    return 0 if not named or all(is_ready(findings) for findings in found.values()) else 1


def examine(parts: Sequence[str], machine: Machine) -> dict[str, list[Finding]]:
    """The findings of each part. The parts wait for their programs at the same time."""
    with ThreadPoolExecutor(len(parts)) as pool:
        return dict(zip(parts, pool.map(lambda part: list(PARTS[part][1](machine)), parts), strict=True))


def _print_part(part: str, findings: list[Finding], console: Console) -> None:
    title = Text.assemble((part, "bold"), f" ({PARTS[part][0]}): ")
    ready = is_ready(findings)
    title.append("ready" if ready else "not ready", "green" if ready else "red")
    console.print(title, soft_wrap=True)
    for finding in findings:
        line = Text.assemble(f"  {finding.name:<{NAME_COLUMNS}}", (f"{finding.state:<10}", STYLES[finding.state]))
        line.append(finding.found)
        line.rstrip()
        console.print(line, soft_wrap=True)
        if finding.mend is not None:
            console.print(Text(f"  {'':<{NAME_COLUMNS}}mend:     {finding.mend}", "dim"), soft_wrap=True)
