"""`tandem up`: a cluster on this machine, in the foreground, until Ctrl-C."""

from __future__ import annotations

import os
import re
from contextlib import AsyncExitStack
from dataclasses import replace

from rich.console import Console

from tandem.cli import console_access
from tandem.cli.checks import check_spec
from tandem.cli.consul_options import check_consul, consul_url, dns_address
from tandem.cli.exit_status import Interruption
from tandem.cli.logs import make_log_directory
from tandem.cli.progress import Readiness
from tandem.cli.state import (
    ClusterState,
    StartingCluster,
    check_no_cluster_runs,
    claim_state,
    remove_state,
    state_file,
    write_state,
)
from tandem.domain.network_address import join_address
from tandem.exit_codes import EXIT_INTERRUPTED, EXIT_SECOND_SIGNAL
from tandem.local_cluster import scrape_targets
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.local_cluster.log_rotation import keep_bounded
from tandem.local_cluster.restarts import Restarts
from tandem.service.background import BackgroundTasks
from tandem.service.restart_budget import RestartPolicy

FIRST_PROMPT = "Mia hid the red key in the old barn. Where did Mia hide the red key?"
"""Suggested for a start; the demo model answers it from the prompt."""
SIMULATED_MAX_TOKENS = 40
"""Suggested for the simulated engine, whose random-looking text ends nowhere before the limit."""


async def up(spec: ClusterSpec, console: Console, policy: RestartPolicy | None = None) -> int:
    """Run a cluster until a signal arrives or no process of it can serve. Returns the exit status.

    `policy` bounds how often a process that exits unexpectedly is restarted.

    Raises:
        ConfigError: a setting is wrong; nothing has been started.
        StartError: a process did not start, or another cluster runs in this directory.
    """
    check_no_cluster_runs()
    check_spec(spec)
    await check_consul(spec, console)
    targets = state_file().parent / scrape_targets.FILE
    if spec.console_port is not None:
        access = console_access.prepare(state_file().parent, spec.host, spec.console_port)
        spec = replace(spec, console_port=access.port, console_keys=access.keys)
    cluster = LocalCluster(replace(spec, log_directory=make_log_directory(spec.log_directory), targets_file=targets))
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
    # Stops the cluster too when it became ready just as a signal arrived, or when a later step fails.
    async with AsyncExitStack() as stack:
        with Readiness(console) as readiness:
            cluster.on_change = readiness.changed
            await interruption.unless_requested(stack.enter_async_context(cluster))
        if interruption.requested.is_set():
            return EXIT_INTERRUPTED
        cluster.on_change = lambda process: None
        interruption.second_status = EXIT_SECOND_SIGNAL
        state = await _state(cluster)
        write_state(state)
        _print_addresses(cluster, state, console)

        def print_line(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        rotation = await stack.enter_async_context(BackgroundTasks())
        rotation.start(keep_bounded(cluster.processes), "log-rotation")
        await interruption.unless_requested(Restarts(cluster, print_line, policy).run())
        if not interruption.requested.is_set():
            print_line("stopping: the cluster can no longer serve requests; see the logs")
        with Readiness(console) as readiness:
            cluster.on_change = readiness.changed
            clean = await cluster.stop()
    return 0 if clean and interruption.requested.is_set() else 1


async def _state(cluster: LocalCluster) -> ClusterState:
    return ClusterState(
        pid=os.getpid(),
        frontend=cluster.frontend.address,
        registry=",".join(registry.address for registry in cluster.registries),
        http=cluster.edge.address if cluster.edge is not None else None,
        consul=consul_url(cluster),
        consul_dns=await dns_address(cluster),
        model=cluster.spec.first_name,
        log=str(cluster.log_directory.resolve()),
        console=_console_url(cluster.spec),
        tls=None if cluster.spec.tls is None else str(cluster.spec.tls.resolve()),
    )


def _console_url(spec: ClusterSpec) -> str | None:
    if spec.console_port is None:
        return None
    return f"{'http' if spec.tls is None else 'https'}://{join_address(spec.host, spec.console_port)}"


def _print_addresses(cluster: LocalCluster, state: ClusterState, console: Console) -> None:
    console.print()
    if cluster.edge is not None:
        scheme = "http" if cluster.spec.tls is None else "https"
        console.print(f"http      {scheme}://{cluster.edge.address}", highlight=False)
    for process in (*cluster.frontends, *cluster.registries):
        console.print(f"{process.role:<9} {process.address}", highlight=False)
    if state.console is not None and cluster.spec.console_keys is not None:
        # The key is not a part of the address: browsers keep addresses in their history, and send them on.
        console.print(f"console   {state.console}", highlight=False, markup=False, soft_wrap=True)
        key = console_access.key_of(cluster.spec.console_keys)
        console.print(f"  key     {key}", highlight=False, markup=False, soft_wrap=True)
    if state.consul is not None:
        console.print(f"consul    {state.consul}/ui", highlight=False, soft_wrap=True)
    if state.consul_dns is not None:
        host, _, port = state.consul_dns.rpartition(":")
        console.print(
            f"DNS       dig @{host} -p {port} {cluster.dns_name('decode')} SRV", highlight=False, soft_wrap=True
        )
    if cluster.spec.metrics:
        console.print(f"metrics   {cluster.targets_file}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"logs      {cluster.log_directory}", highlight=False, markup=False, soft_wrap=True)
    if cluster.spec.tls is not None:
        console.print(f"TLS       {cluster.spec.tls}", highlight=False, markup=False, soft_wrap=True)
    for warning in unknown_names(cluster.spec):
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nTry `{suggestion(cluster.spec)}`. Ctrl-C drains and stops the cluster.", highlight=False)


def suggestion(spec: ClusterSpec) -> str:
    """A first command for this cluster."""
    named = f"--model {spec.first_name} " if spec.more_models else ""
    bounded = f" --max-tokens {SIMULATED_MAX_TOKENS}" if spec.engine == "simulated" else ""
    return f'tandem generate {named}"{FIRST_PROMPT}"{bounded}'


def unknown_names(spec: ClusterSpec) -> list[str]:
    """Aliases and a default that name no model of this cluster. It serves all the same: such a model may still join."""
    names = {spec.first_name, *spec.more_models}
    flags = spec.role_flags.get("frontend", {})
    given = [f"--alias {pair}" for pair in (flags.get("model-aliases") or "").split(",") if pair]
    if flags.get("default-model"):
        given.append(f"--default-model {flags['default-model']}")
    return [
        f"{option}: this cluster has no model of that name (it has {', '.join(sorted(names))})"
        for option in given
        if re.split("[ =]", option)[-1].strip() not in names
    ]
