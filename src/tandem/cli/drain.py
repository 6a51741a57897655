"""`tandem drain`: let one worker finish what it has and end, and say how far it is.

Owns the finding of the worker and the wait for its leaving; the drain itself is the worker's. A worker of a local
cluster is started again afterwards, so draining one after another restarts a cluster without losing a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tandem.cli.membership import ask_all
from tandem.client import calls
from tandem.domain.worker import Start
from tandem.errors import DeadlinePassed, StartError
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
