"""Entries of Consul as the unit tests make them, and the JSON an agent would answer for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tandem_registry.backends.consul.records import Record, Replica, host_and_port, meta, service_id
from tandem_registry.backends.consul.snapshot import Entry
from tandem_registry.view import Health


def make_entry(
    member: Any,
    *,
    owner: str = "one",
    term: int = 1,
    node: str = "n",
    lease_id: str = "",
    health: Health = Health.PASSING,
    is_gone: bool = False,
    is_node_alive: bool = True,
) -> Entry:
    lease = lease_id or f"lease-{member.kind}-{member.member_id}-{member.epoch}"
    record = Record(
        member=member,
        lease_id="" if isinstance(member, Replica) else lease,
        owner=owner,
        term=term,
        is_gone=is_gone,
    )
    return Entry(node, service_id("tandem", record), record, health, is_node_alive)


def make_replica(replica_id: str, epoch: int = 1) -> Replica:
    return Replica(replica_id=replica_id, epoch=epoch, address=f"{replica_id}:7400")


def registry_entry(replica_id: str, **more: Any) -> Entry:
    return make_entry(make_replica(replica_id), owner=replica_id, **more)


def instance(entry: Entry, modify_index: int = 1) -> dict[str, Any]:
    """As in the answer of /v1/health/service."""
    host, port = host_and_port(entry.record)
    status = "critical" if entry.health is Health.CRITICAL else "passing"
    words = "connection refused" if status == "critical" else ""
    own = {"ServiceID": entry.service_id, "Status": status, "Output": words, "Notes": ""}
    checks: list[dict[str, Any]] = [] if entry.health is Health.UNKNOWN else [own]
    serf = {"ServiceID": "", "Status": "passing" if entry.is_node_alive else "critical"}
    return {
        "Node": {"Node": entry.node},
        "Service": {
            "ID": entry.service_id,
            "Address": host,
            "Port": port,
            "Meta": meta(entry.record),
            "ModifyIndex": modify_index,
        },
        "Checks": [serf, *checks],
    }


def answer_of(entries: Iterable[Entry]) -> bytes:
    """The answer of /v1/health/service as Consul writes it."""
    return body_of(instance(entry) for entry in entries)


def body_of(instances: Iterable[dict[str, Any]]) -> bytes:
    """As Consul writes JSON: without spaces, and with a line feed at the end."""
    return json.dumps(list(instances), separators=(",", ":")).encode() + b"\n"
