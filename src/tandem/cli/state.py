"""The file by which `tandem generate` and `tandem status` find the cluster that `tandem up` runs in this directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tandem.errors import StartError
from tandem.tls.paths import Tls, client_tls

VARIABLE = "TANDEM_STATE"
DEFAULT = Path(".tandem") / "cluster.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Where a running cluster is."""

    pid: int
    """Of the `tandem up` that owns it."""
    frontend: str
    registry: str
    model: str
    http: str | None = None
    """Where HTTP is answered; None: there is no edge."""
    tls: str | None = None
    """Directory of its certificates; None: plaintext."""


def state_file() -> Path:
    """The file; the environment may name another one."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def write_state(state: ClusterState) -> None:
    """Say that a cluster runs."""
    file = state_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state), indent=2) + "\n")
    partial.rename(file)


def remove_state(pid: int) -> None:
    """Say that the cluster of that process has ended; the file of another one is left alone."""
    try:
        if read_state().pid == pid:
            state_file().unlink(missing_ok=True)
    except StartError:
        pass


def read_state() -> ClusterState:
    """The running cluster.

    Raises:
        StartError: none runs; says what to do.
    """
    file = state_file()
    hint = "start one with `tandem up`, or give --address"
    try:
        state = ClusterState(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise StartError(f"no cluster runs here ({file} is missing): {hint}") from None
    except (ValueError, TypeError) as problem:
        raise StartError(f"{file} is not readable: {problem}") from None
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        raise StartError(f"the cluster of {file} is gone (process {state.pid} has ended): {hint}") from None
    except PermissionError:
        pass
    return state


def find_tls(directory: Path | None) -> Tls | None:
    """What a command presents: of the directory given, else as the cluster that runs here wants it; None: plaintext."""
    if directory is not None:
        return client_tls(directory)
    try:
        return client_tls(read_state().tls)
    except StartError:
        return None
