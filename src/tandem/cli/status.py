"""`tandem status`: who is alive, in which role, and how busy.

On a terminal a line for each worker, as narrow as its names allow; the rest is in --json, whose fields are those of the
contracts: see docs/command-line.md.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_service_pb
from tandem.errors import NotSupported, StartError, TandemError
from tandem.rpc import clients
from tandem.tls.paths import Tls

COLUMNS = ("WORKER", "ROLE", "STATE", "RUNNING", "WAITING", "KV USED", "ADDRESS")

Load = worker_service_pb.WatchLoadResponse | None
"""None: the worker does not answer."""


async def status(address: str, console: Console, *, as_json: bool, tls: Tls | None = None) -> int:
    """Show the workers that a registry lists.

    Raises:
        StartError: it is not a registry.
        TandemError: the registry does not answer.
    """
    try:
        listed = await clients.list_workers(address, tls=tls)
    except NotSupported:
        raise StartError(f"{address} is not a registry of Tandem") from None
    loads = await asyncio.gather(*(_load(entry.worker.address, tls) for entry in listed))
    rows = list(zip(listed, loads, strict=True))
    if as_json:
        print(json.dumps({"workers": [_row(entry, load) for entry, load in rows]}, indent=2))
        return 0
    if not listed:
        console.print("no worker is registered")
        return 0
    lines = [COLUMNS, *(_cells(entry, load) for entry, load in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        # Wrapped by the terminal when names are long, never cut.
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


async def _load(address: str, tls: Tls | None) -> Load:
    try:
        return await clients.worker_load(address, tls=tls)
    except TandemError:
        return None


def _cells(entry: registry_pb.ListedWorker, load: Load) -> tuple[str, ...]:
    worker = entry.worker
    state = worker_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
    return (
        worker.worker_id,
        worker_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower(),
        state if load is not None else "silent",
        _figure(load, "running_requests"),
        _figure(load, "waiting_requests"),
        _kv_used(load),
        worker.address,
    )


def _kv_used(load: Load) -> str:
    if load is None or not load.HasField("kv_used_tokens") or not load.kv_capacity_tokens:
        return "?"
    return f"{100 * load.kv_used_tokens / load.kv_capacity_tokens:.0f} %"


def _figure(load: Load, name: str) -> str:
    return str(getattr(load, name)) if load is not None and load.HasField(name) else "?"  # type: ignore[arg-type]


def _row(entry: registry_pb.ListedWorker, load: Load) -> dict[str, Any]:
    row: dict[str, Any] = MessageToDict(entry, preserving_proto_field_name=True)
    row["load"] = None if load is None else MessageToDict(load, preserving_proto_field_name=True)
    return row
