"""`tandem up`: a cluster on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from pathlib import Path

from rich.console import Console

from tandem.cli.progress import Readiness
from tandem.cli.state import ClusterState, read_state, remove_state, state_file, write_state
from tandem.errors import ConfigError, StartError
from tandem.runtime.cluster import ClusterSpec, LocalCluster

EXIT_SECOND_SIGNAL = 70


def check_spec(spec: ClusterSpec) -> None:
    """Refuse a cluster that could answer nothing.

    Raises:
        ConfigError: names the option.
    """
    for name in ("prefill", "decode", "aggregated"):
        if getattr(spec, name) < 0:
            raise ConfigError(name, "must not be negative")
    if spec.frontends < 1:
        raise ConfigError("frontends", "there must be at least one")
    if not spec.aggregated and not spec.prefill:
        raise ConfigError("prefill", "there must be a prefill and a decode worker, or an aggregated one")
    if bool(spec.prefill) != bool(spec.decode):
        missing = "decode" if spec.prefill else "prefill"
        raise ConfigError(missing, "prefill and decode workers are only of use together")


def check_nobody_runs() -> None:
    """Refuse to take the place of a cluster that runs.

    Raises:
        StartError: one runs already.
    """
    try:
        state = read_state()
    except StartError:
        return
    raise StartError(
        f"a cluster runs here already (process {state.pid}, {state_file()}): stop it, or set TANDEM_STATE elsewhere"
    )


async def up(spec: ClusterSpec, console: Console) -> int:
    """Run a cluster until a signal comes or a process fails. Returns the exit status."""
    check_spec(spec)
    check_nobody_runs()
    asked = _listen()
    with Readiness(console) as readiness:
        cluster = LocalCluster(spec, readiness.changed)
        started = await _unless_asked(cluster, asked)
    if not started:
        return 0
    write_state(
        ClusterState(
            pid=os.getpid(),
            frontend=cluster.frontend.address,
            registry=cluster.registry.address,
            http=cluster.edge.address if cluster.edge is not None else None,
            model=cluster.frontend.flags["model-name"],
            tls=None if spec.tls is None else str(spec.tls.resolve()),
        )
    )
    try:
        _print_addresses(cluster, console)
        console.print(f"logs      {spec.log_directory}", highlight=False, soft_wrap=True)
        if spec.tls is not None:
            console.print(f"TLS       {spec.tls}", highlight=False, soft_wrap=True)
        console.print(
            '\nTry `tandem generate "Once upon a time"`. Ctrl-C drains and stops the cluster.', highlight=False
        )
        return await _until_end(cluster, asked, console)
    finally:
        remove_state(os.getpid())


def _print_addresses(cluster: LocalCluster, console: Console) -> None:
    console.print()
    if cluster.edge is not None:
        scheme = "http" if cluster.spec.tls is None else "https"
        console.print(f"http      {scheme}://{cluster.edge.address}", highlight=False)
    for process in (*cluster.frontends, cluster.registry):
        console.print(f"{process.role:<9} {process.address}", highlight=False)


async def _unless_asked(cluster: LocalCluster, asked: asyncio.Event) -> bool:
    """Start the cluster; False when it was asked to end first."""
    starting = asyncio.create_task(cluster.start())
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if starting.done():
        await starting
        return True
    starting.cancel()
    await asyncio.wait({starting})
    return False


async def _until_end(cluster: LocalCluster, asked: asyncio.Event, console: Console) -> int:
    waiting = asyncio.create_task(asked.wait())
    failing = asyncio.create_task(cluster.wait_failed())
    await asyncio.wait({waiting, failing}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    failed = failing.done()
    if failed:
        process = failing.result()
        console.print(f"\n{process.name} has ended (status {process.exit_status}): {process.last_words()}", style="red")
    failing.cancel()
    console.print("\ndraining", highlight=False)
    with Readiness(console) as readiness:
        for process in cluster.processes:
            readiness.changed(process)
        cluster.on_change = readiness.changed
        clean = await cluster.stop()
    return 0 if clean and not failed else 1


def _listen() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second one ends this process, and with it its children, at once."""
    asked = asyncio.Event()

    def handle() -> None:
        if asked.is_set():
            os._exit(EXIT_SECOND_SIGNAL)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, handle)
    return asked


def log_directory(given: Path | None) -> Path:
    """Where the processes log: as given, or a fresh temporary directory."""
    return given if given is not None else Path(tempfile.mkdtemp(prefix="tandem-logs-"))
