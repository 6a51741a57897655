"""The command: reads a trace and a fleet, replays each policy, and reports.

Owns the order of these and the progress on a terminal; the options are `tandem.cli.replay_command`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.engine.simulated.options import Options
from tandem.errors import ConfigError
from tandem_frontend.replay.fleet_file import faster, read_fleet
from tandem_frontend.replay.plot import check_plot, write_plot
from tandem_frontend.replay.report import print_summaries, write_json
from tandem_frontend.replay.routing import check_policies
from tandem_frontend.replay.simulation import Replay, replay, utilisation_of
from tandem_frontend.replay.summary import summary_of
from tandem_frontend.replay.trace import TracedRequest, read_trace, scaled, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """What the command was asked for."""

    trace: Path
    fleet: Path
    policies: tuple[str, ...]
    seed: int = 0
    load: float = 1.0
    """Factor on the rate of arrivals."""
    utilisation: float | None = None
    """Share of the workers' time that the prompts take without a cache; None: as the fleet file says."""
    json: Path | None = None
    plot: Path | None = None


def run(request: ReplayRequest, console: Console, status: Console) -> int:
    """Replay and report. Returns the exit status.

    Args:
        request: the options.
        console: gets the tables.
        status: gets the progress, where it is a terminal.

    Raises:
        ConfigError: names the option, the field of the fleet, or the line of the trace.
    """
    _check(request)
    fleet = read_fleet(request.fleet)
    trace = scaled(spread(read_trace(request.trace, fleet.block_tokens), request.seed), request.load)
    options = fleet.options()
    utilisation = utilisation_of(options, trace, fleet.prompt_workers_count)
    if request.utilisation is not None:
        options = faster(options, utilisation / request.utilisation)
        utilisation = request.utilisation
    console.print(_heading(trace, fleet.prompt_workers_count, options, utilisation), highlight=False)
    replays: list[Replay] = []
    with _progress(status) as progress:
        for policy in request.policies:
            task = progress.add_task(policy, total=len(trace))
            replays.append(
                replay(
                    *(fleet, options, trace, policy, request.seed),
                    progress=lambda count, task=task: progress.update(task, completed=count),  # type: ignore[misc]
                )
            )
    summaries = [summary_of(one) for one in replays]
    print_summaries(console, summaries)
    if request.json is not None:
        write_json(request.json, _settings(request, fleet.model_dump(), options, utilisation), summaries)
    if request.plot is not None:
        write_plot(request.plot, replays, summaries)
    return 0


def _check(request: ReplayRequest) -> None:
    check_policies(request.policies)
    for name, value in (("load", request.load), ("utilisation", request.utilisation)):
        if value is not None and not 0 < value <= 1000:
            raise ConfigError(name, f"must be above 0, at most 1000, not {value:g}")
    if request.plot is not None:
        check_plot(request.plot)


def _heading(trace: list[TracedRequest], workers_count: int, options: Options, utilisation: float) -> str:
    return (
        f"{len(trace):,} requests in {trace[-1].arrival_s:,.0f} s; without a cache their prompts would keep "
        f"{workers_count} workers of {options.prefill_tokens_per_s:,.0f} prompt tokens/s busy for {utilisation:.0%} "
        "of that time"
    )


def _progress(status: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=status, transient=True, disable=not status.is_terminal)


def _settings(request: ReplayRequest, fleet: dict[str, Any], options: Options, utilisation: float) -> dict[str, Any]:
    engine = {name: value for name, value in asdict(options).items() if isinstance(value, int | float | str)}
    return {
        "trace": request.trace.name,
        "seed": request.seed,
        "load": request.load,
        "utilisation_without_cache": utilisation,
        "fleet": fleet,
        "engine": engine,
    }
