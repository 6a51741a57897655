"""Consul's binary: the Debian package that contains it. `debian.py` finds or downloads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tandem.local_cluster.debian import DebianProgram, find_program

NAME = "consul"
SUITE = "bullseye"
"""The last suite of Debian that has Consul: 1.8.7."""


def consul_program() -> DebianProgram:
    """Consul and its Debian package."""
    return DebianProgram(name=NAME, title="Consul", package=NAME, suite=SUITE)


def find_consul(cache: Path | None = None, report: Callable[[str], None] = lambda line: None) -> Path:
    """The binary; see `find_program`.

    Raises:
        StartError: there is none, and the download failed; the message says why and what to do.
    """
    return find_program(consul_program(), cache, report)
