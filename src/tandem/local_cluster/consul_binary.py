"""Consul's binary: which package of Debian has it. How it is found and fetched is `debian.py`'s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem.local_cluster.debian import DebianProgram, find_program

NAME = "consul"
SUITE = "bullseye"
"""The last suite of Debian that has Consul: 1.8.7."""


def find_consul(cache: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The binary; see `find_program`.

    Raises:
        StartError: there is none, and none can be fetched; says why and what to do.
    """
    return find_program(DebianProgram(name=NAME, title="Consul", package=NAME, suite=SUITE), cache, tell)
