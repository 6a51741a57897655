"""The state file by which the other commands find the cluster that `tandem up` runs in this directory.

It is written when a cluster starts, with state "starting"; a second cluster is refused while the process it names is
alive.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tandem
from tandem.errors import ConfigError, StartError
from tandem.tls.paths import Tls, client_tls

DEMO_MODEL = Path(tandem.__file__).parent / "models" / "tandem-demo"
"""Part of the package, except in container images, where --model is required."""
VARIABLE = "TANDEM_STATE"
DEFAULT = Path(".tandem") / "cluster.json"
HINT = "start one with `tandem up`, or give --address"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingCluster:
    """A cluster that is not serving yet."""

    pid: int
    """Of the `tandem up` that owns it."""
    log: str
    """Directory of the processes' logs."""
    state: str = "starting"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Addresses of a running cluster."""

    pid: int
    """Of the `tandem up` that owns it."""
    frontend: str
    registry: str
    """Comma-separated host:port."""
    model: str
    log: str
    """Directory of the processes' logs."""
    http: str | None = None
    """host:port of HTTP; None: there is no edge."""
    consul: str | None = None
    """URL of the Consul that stores its membership; None: the registry stores it in memory."""
    consul_dns: str | None = None
    """host:port of the DNS of that Consul; None: not known."""
    console: str | None = None
    """URL of the console; None: there is none."""
    tls: str | None = None
    """Directory of its certificates; None: plaintext."""
    state: str = "serving"


def state_file() -> Path:
    """Path of the state file: $TANDEM_STATE, or .tandem/cluster.json."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def claim_state(state: StartingCluster) -> None:
    """Write the state file for a cluster that starts, unless another one starts or runs here.

    Raises:
        StartError: another cluster starts or runs here, or the file cannot be written.
    """
    file = state_file()
    partial = _write_partial(state)
    try:
        check_no_cluster_runs()
        file.unlink(missing_ok=True)
        # A link is atomic: it fails if another `tandem up` has just created the file.
        os.link(partial, file)
    except FileExistsError:
        check_no_cluster_runs()
        raise StartError(f"another cluster has just been started here ({file})") from None
    finally:
        partial.unlink(missing_ok=True)


def write_state(state: ClusterState) -> None:
    """Replace the state file by that of a serving cluster."""
    _write_partial(state).rename(state_file())


def remove_state(pid: int) -> None:
    """Remove the state file if it belongs to process `pid`; keep that of another cluster."""
    with contextlib.suppress(StartError):
        if _read().pid == pid:
            state_file().unlink(missing_ok=True)


def check_no_cluster_runs() -> None:
    """Refuse to start while another cluster starts or runs here.

    Raises:
        StartError: one does; names its process.
    """
    try:
        state = _read()
    except StartError:
        return
    verb = "is starting" if isinstance(state, StartingCluster) else "runs"
    raise StartError(
        f"a cluster {verb} here already (process {state.pid}, {state_file()}): stop it, or set another TANDEM_STATE"
    )


def read_state() -> ClusterState:
    """State of the running cluster.

    Raises:
        StartError: no cluster runs here, or it is still starting.
    """
    state = _read()
    if isinstance(state, StartingCluster):
        raise StartError(f"the cluster is still starting; its logs are in {state.log}")
    return state


def read_log_directory() -> Path | None:
    """Log directory of the cluster that starts or runs here; None: there is none."""
    try:
        return Path(_read().log)
    except StartError:
        return None


def _write_partial(state: StartingCluster | ClusterState) -> Path:
    file = state_file()
    partial = file.with_suffix(f".{state.pid}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(state), indent=2) + "\n")
    except OSError as problem:
        raise StartError(f"{file} cannot be written ({problem.strerror}): set another TANDEM_STATE") from None
    return partial


def _read() -> StartingCluster | ClusterState:
    file = state_file()
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        kind = StartingCluster if values.get("state") == "starting" else ClusterState
        state = kind(**values)
    except FileNotFoundError:
        raise StartError(f"no cluster runs here ({file} is missing): {HINT}") from None
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise StartError(f"{file} is not readable: {problem}") from None
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        raise StartError(f"the cluster of {file} has stopped (process {state.pid} has exited): {HINT}") from None
    except PermissionError:
        # The process exists and belongs to another user.
        pass
    return state


def find_tls(directory: Path | None) -> Tls | None:
    """Client certificate of `directory`, else of the cluster that runs here; None: plaintext.

    Raises:
        ConfigError: there is no such directory.
    """
    if directory is not None:
        if not directory.is_dir():
            raise ConfigError("tls", f"there is no directory {directory}")
        return client_tls(directory)
    try:
        return client_tls(read_state().tls)
    except StartError:
        return None
