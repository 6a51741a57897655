"""`tandem health`: does a process serve?"""

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
"""From its last leg to its leaving: it settles, leaves the registry, and stops its engine."""
LOOK_S = 0.2


async def drain(worker_id: str, registries: Sequence[str], tls: Tls | None = None) -> int:
    """Drain a worker and wait until its start has left. Returns the exit status.

    Raises:
        StartError: no worker has that name.
        DeadlinePassed: its legs have ended, and it does not leave.
        TandemError: no registry or not the worker answers.
    """
    workers = [entry.worker for entry in (await ask_all(registries, tls)).workers]
    found = {worker.worker_id: worker for worker in workers}.get(worker_id)
    if found is None:
        known = ", ".join(sorted(worker.worker_id for worker in workers)) or "none"
        raise StartError(f"no worker is called {worker_id} (known: {known})")
    told = None
    async for open_legs in calls.drain_worker(found.address, found.epoch, tls=tls):
        if open_legs != told:
            told = open_legs
            print(f"{worker_id}: {open_legs} open legs", flush=True)
    await _until_left((worker_id, found.epoch), registries, tls)
    print(f"{worker_id}: epoch {found.epoch} has left")
    return 0


async def _until_left(start: Start, registries: Sequence[str], tls: Tls | None) -> None:
    looks = int(LEAVING_TIMEOUT_S / LOOK_S)
    for _ in range(looks):
        listed = [(entry.worker.worker_id, entry.worker.epoch) for entry in (await ask_all(registries, tls)).workers]
        if start not in listed:
            return
        await asyncio.sleep(LOOK_S)
    raise DeadlinePassed(f"{start[0]} has not left within {LEAVING_TIMEOUT_S:g} s of its last leg")


def certs(directory: Path, hosts: Sequence[str], days: int, console: Console) -> int:
    """Make or renew them and tell what there is now. Returns the exit status.

    Raises:
        ConfigError: an option is wrong.
        StartError: the directory cannot be written, or its CA cannot be used.
    """
    table = Table("certificate", "serial", "until (UTC)")
    for issued in issue_all(directory, hosts, days):
        table.add_row(f"{issued.name}.pem", f"{issued.serial_number:x}", f"{issued.end_time:%Y-%m-%d %H:%M}")
    console.print(table)
    console.print(
        f"Start a cluster with `tandem up --tls {directory}`. Run this again to renew: running processes take the new "
        "certificates by themselves.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


async def health(address: str, service: str, tls: Tls | None = None) -> int:
    """Print what a process says of itself, or of one of its services. Returns the exit status: 0 when it serves.

    Raises:
        ConfigError: it carries no such service.
        StartError: it answers no health checks.
        TandemError: it does not answer.
    """
    try:
        serving = await calls.is_serving(address, service, tls=tls)
    except InvalidRequest as problem:
        raise ConfigError("service", problem.message.removeprefix("service: ")) from None
    except NotSupported:
        raise StartError(f"{address} is not a process of Tandem: it answers no health checks") from None
    print("serving" if serving else "not serving")
    return 0 if serving else 1
