"""The options of the subcommands that concern this machine and shell, not a cluster: doctor.

Each is implemented in the module of its name, imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.cli.exit_status import end_call


def add_to(app: typer.Typer) -> None:
    """Register the subcommands."""
    app.command()(doctor)


def doctor(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="Parts to check: cpu, gpu, edge, consul, containers; default: all.", metavar="PART"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what this machine lacks for each part, with the command that mends it."""

    def run() -> int:
        from rich.console import Console

        from tandem.cli.doctor import command
        from tandem.cli.doctor.machine import Machine

        return command.doctor(parts or [], Machine(), Console(highlight=False), json_only=as_json)

    end_call("doctor", run)
