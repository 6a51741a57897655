"""`tandem status`: who is alive, in which role and epoch, and how busy."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_service_pb
from tandem.errors import TandemError
from tandem.rpc import clients
from tandem.tls.paths import Tls

COLUMNS = ("worker", "role", "state", "epoch", "address", "model", "running", "waiting", "KV tokens", "lease age")

Load = worker_service_pb.WatchLoadResponse | None
"""None: the worker does not answer."""


async def status(address: str, console: Console, *, as_json: bool, tls: Tls | None = None) -> int:
    """Show the workers that a registry lists.

    Raises:
        TandemError: the registry does not answer.
    """
    listed = await clients.list_workers(address, tls=tls)
    loads = await asyncio.gather(*(_load(entry.worker.address, tls) for entry in listed))
    if as_json:
        print(json.dumps({"workers": [_row(entry, load) for entry, load in zip(listed, loads, strict=True)]}))
        return 0
    if not listed:
        console.print("no worker is registered")
        return 0
    table = Table(
        "worker", "role", "state", "epoch", "address", "model", "running", "waiting", "KV tokens", "lease age"
    )
    for entry, load in zip(listed, loads, strict=True):
        table.add_row(*_cells(entry, load))
    console.print(table)
    return 0


async def _load(address: str, tls: Tls | None) -> Load:
    try:
        return await clients.worker_load(address, tls=tls)
    except TandemError:
        return None


def _cells(entry: registry_pb.ListedWorker, load: Load) -> list[str]:
    worker = entry.worker
    if load is None:
        busy = ["unreachable", "", ""]
    else:
        kv = f"{load.kv_used_tokens:,} of {load.kv_capacity_tokens:,}" if load.HasField("kv_used_tokens") else "?"
        busy = [_figure(load, "running_requests"), _figure(load, "waiting_requests"), kv]
    age_s = entry.lease_age.ToNanoseconds() / 1e9
    return [
        worker.worker_id,
        worker_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower(),
        worker_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower(),
        str(worker.epoch),
        worker.address,
        worker.capabilities.model,
        *busy,
        f"{age_s:.1f} s",
    ]


def _figure(load: worker_service_pb.WatchLoadResponse, name: str) -> str:
    return str(getattr(load, name)) if load.HasField(name) else "?"  # type: ignore[arg-type]


def _row(entry: registry_pb.ListedWorker, load: Load) -> dict[str, Any]:
    row: dict[str, Any] = MessageToDict(entry, preserving_proto_field_name=True)
    row["load"] = None if load is None else MessageToDict(load, preserving_proto_field_name=True)
    return row
