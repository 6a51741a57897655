"""An option whose value is optional (`--consul [ADDRESS]`), which Typer does not support.

Imports nothing: every command runs this module first.
"""

from __future__ import annotations

CONSUL = "--consul"
LOCAL = "local"
"""Value of `--consul` without an address: start a local agent."""


def with_value(arguments: list[str]) -> list[str]:
    """The arguments, with `LOCAL` inserted after a bare `--consul` of `tandem up`."""
    if not arguments or arguments[0] != "up":
        return arguments
    filled = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        filled += [argument, LOCAL] if argument == CONSUL and following.startswith("-") else [argument]
    return filled
