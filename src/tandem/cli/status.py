"""`tandem status`: state, load and lease of every worker and frontend, the models, and the view of each registry.

Four narrow tables; everything else is in --json, whose fields are those of the protos: see
docs/reference/command-line.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.types.v1 import worker_pb2
from tandem.api.worker.v1 import worker_service_pb2 as worker_service_pb
from tandem.cli import model_status
from tandem.cli.membership import Membership, RegistryResponse, ask_all
from tandem.cli.tables import print_columns
from tandem.client import calls
from tandem.errors import TandemError
from tandem.tls.paths import Tls

LOAD_COLUMNS = ("NAME", "ROLE", "STATE", "RUNNING", "WAITING", "KV USED", "ADDRESS")
LEASE_COLUMNS = ("NAME", "LEASE AGE", "EPOCH", "HEALTH", "KEPT BY")
REGISTRY_COLUMNS = ("REGISTRY", "REVISION", "ITS VIEW")
NOTHING = "-"

Load = worker_service_pb.WatchLoadResponse | None
"""None: the worker cannot be reached."""


async def status(addresses: Sequence[str], console: Console, *, as_json: bool, tls: Tls | None = None) -> int:
    """Print members, load and registries.

    Raises:
        StartError: an address is not that of a registry.
        TandemError: no registry can be reached.
    """
    fleet = await ask_all(addresses, tls)
    loads = await asyncio.gather(*(_load(entry.worker.address, tls) for entry in fleet.workers))
    models = await model_status.model_lists([entry.frontend for entry in fleet.frontends], tls)
    if as_json:
        print(json.dumps({**_as_json(fleet, loads), "models": model_status.as_json(models)}, indent=2))
        return 0
    if not fleet.workers:
        console.print("no workers registered")
    if fleet.workers or fleet.frontends:
        busy = [_busy(entry, load) for entry, load in zip(fleet.workers, loads, strict=True)]
        print_columns(console, LOAD_COLUMNS, [*busy, *map(_frontend, fleet.frontends)])
        console.print()
        print_columns(console, LEASE_COLUMNS, _leases(fleet))
    if model_rows := model_status.rows(models):
        console.print()
        print_columns(console, model_status.COLUMNS, model_rows)
    console.print()
    print_columns(console, REGISTRY_COLUMNS, [_registry(response) for response in fleet.responses])
    return 0


async def _load(address: str, tls: Tls | None) -> Load:
    try:
        return await calls.worker_load(address, tls=tls)
    except TandemError:
        return None


def _busy(entry: registry_pb.ListedWorker, load: Load) -> tuple[str, ...]:
    worker = entry.worker
    return (
        worker.worker_id,
        worker_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower(),
        _state(worker.state) if load is not None else "unreachable",
        _load_field(load, "running_requests"),
        _load_field(load, "waiting_requests"),
        _kv_used(load),
        worker.address,
    )


def _frontend(entry: registry_pb.ListedFrontend) -> tuple[str, ...]:
    frontend = entry.frontend
    return (
        frontend.frontend_id,
        "frontend",
        _state(frontend.state),
        NOTHING,
        NOTHING,
        NOTHING,
        frontend.address,
    )


def _leases(fleet: Membership) -> list[tuple[str, ...]]:
    workers = [_lease(fleet, entry, entry.worker.worker_id, entry.worker.epoch) for entry in fleet.workers]
    frontends = [_lease(fleet, entry, entry.frontend.frontend_id, entry.frontend.epoch) for entry in fleet.frontends]
    return [*workers, *frontends]


def _lease(
    fleet: Membership, entry: registry_pb.ListedWorker | registry_pb.ListedFrontend, name: str, epoch: int
) -> tuple[str, ...]:
    age = f"{entry.lease_age.ToNanoseconds() / 1e9:.1f} s" if entry.HasField("lease_age") else NOTHING
    health = registry_pb.ListedHealth.Name(entry.health).removeprefix("LISTED_HEALTH_").lower()
    holder = fleet.holder_address(entry.lease_keeper) if entry.lease_keeper else NOTHING
    return name, age, str(epoch), NOTHING if health == "unspecified" else health, holder


def _registry(response: RegistryResponse) -> tuple[str, ...]:
    if response.listed is None:
        return response.address, NOTHING, f"unreachable: {response.problem}"
    view = "live" if response.is_live else "last known"
    if not response.is_live and response.since is not None:
        ago_s = (datetime.now(UTC) - response.since).total_seconds()
        view = f"last known since {response.since.astimezone():%H:%M:%S}, {max(0.0, ago_s):.0f} s ago"
    return response.address, str(response.listed.revision), view


def _state(number: worker_pb2.WorkerState.ValueType) -> str:
    return worker_pb2.WorkerState.Name(number).removeprefix("WORKER_STATE_").lower()


def _kv_used(load: Load) -> str:
    if load is None or not load.HasField("kv_used_tokens") or not load.kv_capacity_tokens:
        return "?"
    return f"{100 * load.kv_used_tokens / load.kv_capacity_tokens:.0f} %"


def _load_field(load: Load, name: str) -> str:
    return str(getattr(load, name)) if load is not None and load.HasField(name) else "?"  # type: ignore[arg-type]


def _as_json(fleet: Membership, loads: Sequence[Load]) -> dict[str, Any]:
    return {
        "workers": [
            {**_fields(entry), "load": None if load is None else _fields(load)}
            for entry, load in zip(fleet.workers, loads, strict=True)
        ],
        "frontends": [_fields(entry) for entry in fleet.frontends],
        "registries": [_registry_fields(response) for response in fleet.responses],
    }


def _registry_fields(response: RegistryResponse) -> dict[str, Any]:
    if response.listed is None:
        return {"address": response.address, "problem": str(response.problem)}
    names = ("registry_id", "revision", "replica_id", "source", "source_since")
    fields = _fields(response.listed)
    return {"address": response.address, **{name: fields[name] for name in names if name in fields}}


def _fields(message: Any) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return fields
