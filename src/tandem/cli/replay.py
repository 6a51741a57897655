"""The options of `tandem replay`: a trace of requests against a simulated fleet, in virtual time.

The one command that runs a part of a service in its own process: the frontend's admission and routing, imported when it
runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.exit_status import end_call

Seed = Annotated[int, typer.Option(help="Seed of all randomness: the same seed gives the same result.")]


def replay(
    trace: Annotated[Path, typer.Argument(help="Trace in Mooncake's JSONL format.", metavar="TRACE")],
    fleet: Annotated[Path, typer.Option(help="The fleet, in TOML or JSON.", metavar="FILE")],
    policy: Annotated[
        str, typer.Option(help="Routing policies to compare, comma-separated; oracle: knows every engine's state.")
    ] = "auto",
    seed: Seed = 0,
    load: Annotated[float, typer.Option(help="Factor on the rate of arrivals.")] = 1.0,
    utilisation: Annotated[
        float | None,
        typer.Option(
            help="Set the speed of prefill so that, without a cache, the prompts keep it busy for this share of the "
            "time; default: the fleet file's speed."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to a JSON file.", metavar="FILE")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write a plot, .png or .svg; needs matplotlib.", metavar="FILE")
    ] = None,
) -> None:
    """Replay a trace through the frontend's admission and routing, in virtual time."""

    def run() -> int:
        from rich.console import Console
        from tandem_frontend.replay.command import ReplayRequest, run

        from tandem.cli.tables import table_console

        names = tuple(name.strip() for name in policy.split(","))
        request = ReplayRequest(
            trace=trace,
            fleet=fleet,
            policies=names,
            seed=seed,
            load=load,
            utilisation=utilisation,
            json=json,
            plot=plot,
        )
        return run(request, table_console(), Console(stderr=True))

    end_call("replay", run)
