"""The options of the subcommands that concern this machine and shell, not a cluster: doctor, completion.

Each is implemented in the module of its name, imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.cli.completion import SHELLS, script
from tandem.cli.exit_status import end_call

PARTS = ("cpu", "gpu", "edge", "consul", "containers")
"""Of `doctor`, for completion and help; its own list, with the probes, is imported when it runs."""


def add_to(app: typer.Typer) -> None:
    """Register the subcommands."""
    app.command()(doctor)
    app.command()(completion)


def doctor(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Parts to check: {', '.join(PARTS)}; default: all.", metavar="PART", autocompletion=lambda: PARTS
        ),
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


def completion(
    shell: Annotated[
        str, typer.Argument(help=f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}.", autocompletion=lambda: SHELLS)
    ],
) -> None:
    """Print the script with which a shell completes commands, options and values of `tandem`."""

    def run() -> int:
        print(script(shell))
        return 0

    end_call("completion", run)
