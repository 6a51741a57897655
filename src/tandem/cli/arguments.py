"""What the library of options cannot do: an option whose value may be left out.

Imports nothing, because every command passes here.
"""

from __future__ import annotations

CONSUL = "--consul"
LOCAL = "local"
"""Stands for an agent of the cluster's own, where no address is given."""


def with_value(arguments: list[str]) -> list[str]:
    """The arguments of `tandem up`, with an address behind a bare --consul."""
    if not arguments or arguments[0] != "up":
        return arguments
    filled = []
    for word, follower in zip(arguments, [*arguments[1:], "--"], strict=True):
        filled += [word, LOCAL] if word == CONSUL and follower.startswith("-") else [word]
    return filled
