"""The file by which `tandem generate` and `tandem status` find the cluster that `tandem up` runs in this directory.

It is there from the moment a cluster starts, and says so; a second cluster is refused as long as it names a process
that lives.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.errors import StartError
from tandem.tls.paths import Tls, client_tls

DEMO_MODEL = Path("models") / "tandem-demo"
"""In a checkout; anywhere else --model must be given."""
VARIABLE = "TANDEM_STATE"
DEFAULT = Path(".tandem") / "cluster.json"
HINT = "start one with `tandem up`, or give --address"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingCluster:
    """A cluster that does not serve yet."""

    pid: int
    """Of the `tandem up` that owns it."""
    log: str
    """Directory of the processes' logs."""
    state: str = "starting"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Where a running cluster is."""

    pid: int
    """Of the `tandem up` that owns it."""
    frontend: str
    registry: str
    """Several are separated by commas."""
    model: str
    log: str
    """Directory of the processes' logs."""
    http: str | None = None
    """Where HTTP is answered; None: there is no edge."""
    consul: str | None = None
    """URL of the Consul that keeps its membership; None: the registry does."""
    consul_dns: str | None = None
    """host:port of the DNS of that Consul; None: not known."""
    tls: str | None = None
    """Directory of its certificates; None: plaintext."""
    state: str = "serving"


def state_file() -> Path:
    """The file; the environment may name another one."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def claim_state(state: StartingCluster) -> None:
    """Say that a cluster starts here, if none does or runs.

    Raises:
        StartError: there is one already, or the file cannot be written.
    """
    file = state_file()
    partial = _write_partial(state)
    try:
        check_nobody_runs()
        file.unlink(missing_ok=True)
        # Fails where another one was a moment faster.
        os.link(partial, file)
    except FileExistsError:
        check_nobody_runs()
        raise StartError(f"another cluster has just been started here ({file})") from None
    finally:
        partial.unlink(missing_ok=True)


def write_state(state: ClusterState) -> None:
    """Say that the cluster serves."""
    _write_partial(state).rename(state_file())


def remove_state(pid: int) -> None:
    """Say that the cluster of that process has ended; the file of another one is left alone."""
    with contextlib.suppress(StartError):
        if _read().pid == pid:
            state_file().unlink(missing_ok=True)


def check_nobody_runs() -> None:
    """Refuse to take the place of a cluster that starts or runs.

    Raises:
        StartError: there is one already.
    """
    try:
        state = _read()
    except StartError:
        return
    verb = "is starting" if isinstance(state, StartingCluster) else "runs"
    raise StartError(
        f"a cluster {verb} here already (process {state.pid}, {state_file()}): stop it, or set TANDEM_STATE elsewhere"
    )


def read_state() -> ClusterState:
    """The running cluster.

    Raises:
        StartError: none runs, or it is still starting; says what to do.
    """
    state = _read()
    if isinstance(state, StartingCluster):
        raise StartError(f"a cluster is starting here; its log is {state.log}")
    return state


def read_log_directory() -> Path | None:
    """Where the cluster that starts or runs here logs; None when there is none."""
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
        raise StartError(f"{file} cannot be written ({problem.strerror}): set TANDEM_STATE elsewhere") from None
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
        raise StartError(f"the cluster of {file} is gone (process {state.pid} has ended): {HINT}") from None
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
