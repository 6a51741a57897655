"""`tandem controller`: runs the controller in the foreground, with its settings as flags."""

from __future__ import annotations

import os
import sys

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def controller(context: typer.Context) -> None:
    """Change the roles of workers so that they follow the load, until Ctrl-C. Takes the settings of the controller."""
    from tandem.cli.exit_status import end_call

    def run() -> int:
        from tandem.cli.state import read_state
        from tandem.controller.__main__ import main

        arguments = list(context.args)
        is_named = any(one.partition("=")[0] in ("--registry", "--config", "--help") for one in arguments)
        if not is_named and "TANDEM_CONTROLLER_REGISTRY" not in os.environ:
            arguments += ["--registry", read_state().registry]
        sys.argv = ["tandem-controller", *arguments]
        main()

    end_call("controller", run)
