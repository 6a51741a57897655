"""`tandem drain`, `tandem certs` and `tandem health`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tandem.cli.membership import ask_all
from tandem.client import calls
from tandem.domain.worker import Start
from tandem.errors import ConfigError, DeadlinePassed, InvalidRequest, NotSupported, StartError
from tandem.tls.authority import issue_all
from tandem.tls.paths import Tls

LEAVING_TIMEOUT_S = 15.0
"""Limit from the end of its last leg until it is deregistered."""
POLL_INTERVAL_S = 0.2


async def drain(worker_id: str, registries: Sequence[str], tls: Tls | None = None) -> int:
    """Drain a worker and wait until that epoch of it is deregistered. Returns the exit status.

    Raises:
        StartError: no worker has that id.
        DeadlinePassed: all its legs have ended, but it is still registered.
        TandemError: no registry, or not the worker, can be reached.
    """
    workers = [entry.worker for entry in (await ask_all(registries, tls)).workers]
    found = {worker.worker_id: worker for worker in workers}.get(worker_id)
    if found is None:
        known = ", ".join(sorted(worker.worker_id for worker in workers)) or "none"
        raise StartError(f"no worker {worker_id} is registered (registered: {known})")
    printed = None
    async for open_legs in calls.drain_worker(found.address, found.epoch, tls=tls):
        if open_legs != printed:
            printed = open_legs
            print(f"{worker_id}: {open_legs} open legs", flush=True)
    await _wait_until_deregistered((worker_id, found.epoch), registries, tls)
    print(f"{worker_id}: drained, epoch {found.epoch} is deregistered")
    return 0


async def _wait_until_deregistered(start: Start, registries: Sequence[str], tls: Tls | None) -> None:
    for _ in range(int(LEAVING_TIMEOUT_S / POLL_INTERVAL_S)):
        listed = [(entry.worker.worker_id, entry.worker.epoch) for entry in (await ask_all(registries, tls)).workers]
        if start not in listed:
            return
        await asyncio.sleep(POLL_INTERVAL_S)
    raise DeadlinePassed(f"{start[0]} is still registered {LEAVING_TIMEOUT_S:g} s after its last leg; see its log")


def certs(directory: Path, hosts: Sequence[str], days: int, console: Console) -> int:
    """Create or renew the certificates and print a table of them. Returns the exit status.

    Raises:
        ConfigError: an option is wrong.
        StartError: the directory cannot be written, or its CA cannot be used.
    """
    table = Table("certificate", "serial", "valid until (UTC)")
    for issued in issue_all(directory, hosts, days):
        table.add_row(f"{issued.name}.pem", f"{issued.serial_number:x}", f"{issued.end_time:%Y-%m-%d %H:%M}")
    console.print(table)
    console.print(
        f"Start a cluster with `tandem up --tls {directory}`. Run this again to renew: running processes reload their "
        "certificates.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


async def health(address: str, service: str, tls: Tls | None = None) -> int:
    """Print the health of a process or of one of its services. Returns the exit status: 0 if it is serving.

    Raises:
        ConfigError: the process has no such service.
        StartError: the process has no health service.
        TandemError: the process cannot be reached.
    """
    try:
        serving = await calls.is_serving(address, service, tls=tls)
    except InvalidRequest as problem:
        raise ConfigError("service", problem.message.removeprefix("service: ")) from None
    except NotSupported:
        raise StartError(f"{address} is not a Tandem process: it has no health service") from None
    print("serving" if serving else "not serving")
    return 0 if serving else 1
