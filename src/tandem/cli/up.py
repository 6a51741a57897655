"""`tandem up`: a cluster on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import os
from dataclasses import replace

from rich.console import Console

from tandem.cli.checks import check_spec
from tandem.cli.interruption import EXIT_INTERRUPTED, EXIT_SECOND_SIGNAL, Interruption
from tandem.cli.logs import make_log_directory
from tandem.cli.progress import Readiness
from tandem.cli.state import (
    ClusterState,
    StartingCluster,
    check_nobody_runs,
    claim_state,
    remove_state,
    write_state,
)
from tandem.runtime.cluster import ClusterSpec, LocalCluster
from tandem.runtime.restarts import RestartPolicy, Restarts


async def up(spec: ClusterSpec, console: Console, policy: RestartPolicy | None = None) -> int:
    """Run a cluster until a signal comes or nothing of it can serve any more. Returns the exit status.

    `policy` says how often a process that dies is started again.

    Raises:
        ConfigError: a setting is wrong; nothing has been started.
        StartError: a process did not start, or a cluster runs here already.
    """
    check_nobody_runs()
    check_spec(spec)
    cluster = LocalCluster(replace(spec, log_directory=make_log_directory(spec.log_directory)))
    claim_state(StartingCluster(pid=os.getpid(), log=str(cluster.log_directory.resolve())))
    try:
        return await _run(cluster, console, policy)
    finally:
        remove_state(os.getpid())


async def _run(cluster: LocalCluster, console: Console, policy: RestartPolicy | None) -> int:
    def end_at_once() -> None:
        cluster.kill()
        remove_state(os.getpid())

    interruption = Interruption(console, end_at_once)
    with Readiness(console) as readiness:
        cluster.on_change = readiness.changed
        await interruption.unless_asked(cluster.start())
    if interruption.asked.is_set():
        # It may have come up at the very moment of the signal.
        await cluster.stop()
        return EXIT_INTERRUPTED
    cluster.on_change = lambda process: None
    interruption.second_status = EXIT_SECOND_SIGNAL
    write_state(_state(cluster))
    _print_addresses(cluster, console)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    await interruption.unless_asked(Restarts(cluster, tell, policy).run())
    if not interruption.asked.is_set():
        tell("nothing here can serve any more")
    with Readiness(console) as readiness:
        cluster.on_change = readiness.changed
        clean = await cluster.stop()
    return 0 if clean and interruption.asked.is_set() else 1


def _state(cluster: LocalCluster) -> ClusterState:
    return ClusterState(
        pid=os.getpid(),
        frontend=cluster.frontend.address,
        registry=cluster.registry.address,
        http=cluster.edge.address if cluster.edge is not None else None,
        model=cluster.frontend.flags["model-name"],
        log=str(cluster.log_directory.resolve()),
        tls=None if cluster.spec.tls is None else str(cluster.spec.tls.resolve()),
    )


def _print_addresses(cluster: LocalCluster, console: Console) -> None:
    console.print()
    if cluster.edge is not None:
        scheme = "http" if cluster.spec.tls is None else "https"
        console.print(f"http      {scheme}://{cluster.edge.address}", highlight=False)
    for process in (*cluster.frontends, cluster.registry):
        console.print(f"{process.role:<9} {process.address}", highlight=False)
    console.print(f"logs      {cluster.log_directory}", highlight=False, markup=False, soft_wrap=True)
    if cluster.spec.tls is not None:
        console.print(f"TLS       {cluster.spec.tls}", highlight=False, markup=False, soft_wrap=True)
    console.print('\nTry `tandem generate "Once upon a time"`. Ctrl-C drains and stops the cluster.', highlight=False)
