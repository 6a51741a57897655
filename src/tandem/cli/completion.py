"""Shell completion: the script of `tandem completion`, and the answers to what the script asks on each Tab.

Typer makes both; its own options `--install-completion` and `--show-completion` are off, because a package manager or
the user decides where such a script belongs. The script runs `tandem` with VARIABLE set.
"""

from __future__ import annotations

import os

from tandem.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "tandem"
VARIABLE = "_TANDEM_COMPLETE"


def script(shell: str) -> str:
    """The script that a shell has to source.

    Raises:
        ConfigError: there is none for that shell.
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    if shell not in SHELLS:
        raise ConfigError("SHELL", f"must be one of {', '.join(SHELLS)}, not {shell!r}")
    return str(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell))


def prepare() -> None:
    """Let Typer answer if a script asks. Does nothing, and imports nothing, in every other run."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
