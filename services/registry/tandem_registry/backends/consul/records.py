"""A member as Consul stores it: one service instance, with tags for DNS and people, and meta with the whole record.

Pure. Owns the names and formats that are written, and the validation of what is read. Load is never stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from tandem.domain.adapter import DIGEST, Adapter, is_name
from tandem.domain.frontend import Frontend
from tandem.domain.network_address import join_address, split_address
from tandem.domain.worker import (
    Capabilities,
    Worker,
    WorkerRole,
    WorkerState,
    capabilities_digest,
    capability_text,
    field_names,
    written_fields,
)
from tandem.errors import InvalidRequest

VALUE_BYTES_MAX = 512
"""Of one meta value; Consul rejects longer ones, and more than 64 of them."""
ADAPTERS_KEY = "adapters_"
"""With a number from 0. Three adapters fit in one value."""
SERVICE_NAME_PATTERN = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""The service name must be a DNS label."""
SERVICE_ID_WITHOUT = re.compile("[^A-Za-z0-9._-]")


class Unreadable(ValueError):
    """A Consul entry that was not written by a registry, or was altered; the message names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One incarnation of a registry process."""

    kind: ClassVar[str] = "registry"

    replica_id: str
    epoch: int
    address: str
    release: str = ""

    @property
    def member_id(self) -> str:
        """Derived from its address, so that a restart replaces the previous incarnation."""
        return SERVICE_ID_WITHOUT.sub("-", self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A member and its lease, as written by the replica that owns the lease."""

    member: Worker | Frontend | Replica
    lease_id: str = ""
    owner: str
    """Id of the replica that owns the lease and wrote the entry; key `keeper` in meta."""
    term: int = 1
    """Incremented each time another replica adopts the lease."""
    is_gone: bool = False
    """Tombstone: the member has left, and an older entry of it cannot be removed."""

    @property
    def key(self) -> tuple[str, str]:
        """Kind and id, the same for all incarnations of a member."""
        return self.member.kind, self.member.member_id

    @property
    def rank(self) -> tuple[int, int, str]:
        """Of several entries of one member the highest wins: the newest incarnation, adopted last."""
        return self.member.epoch, self.term, self.owner


def service_id(service: str, record: Record) -> str:
    """Id of the entry at an agent. Contains the epoch, so that two incarnations never overwrite each other."""
    kind, member_id = record.key
    return f"{service}-{kind}-{member_id}-{record.member.epoch}"


def tags(record: Record) -> list[str]:
    """The tag by which DNS finds the entry: `decode.<service>.service.consul`."""
    member = record.member
    return [member.role.value if isinstance(member, Worker) else member.kind]


def host_and_port(record: Record) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port, as Consul's DNS returns them."""
    return split_address(record.member.address)


def meta(record: Record) -> dict[str, str]:
    """The record as Consul meta: one key for each field."""
    member = record.member
    written = {
        "kind": member.kind,
        "id": member.replica_id if isinstance(member, Replica) else member.member_id,
        "epoch": str(member.epoch),
        "release": member.release,
        "keeper": record.owner,
        "term": str(record.term),
    }
    if not isinstance(member, Replica):
        written |= {"lease_id": record.lease_id, "state": "gone" if record.is_gone else member.state.value}
    if isinstance(member, Frontend):
        written["model"] = member.model
    if isinstance(member, Worker):
        written |= _worker_meta(member)
    return written


def _worker_meta(worker: Worker) -> dict[str, str]:
    written = {
        name: capability_text(getattr(worker.capabilities, name)) for name in written_fields(worker.capabilities)
    }
    written |= {"role": worker.role.value, "leg_contract": str(worker.leg_contract)}
    written |= {f"{ADAPTERS_KEY}{number}": text for number, text in enumerate(_adapter_texts(worker.adapters))}
    if worker.capabilities_digest is not None:
        written["capabilities_digest"] = worker.capabilities_digest
    if worker.bootstrap_host is not None and worker.bootstrap_port is not None:
        written |= {"bootstrap_host": worker.bootstrap_host, "bootstrap_port": str(worker.bootstrap_port)}
    return written


def _adapter_texts(adapters: Iterable[Adapter]) -> list[str]:
    """Adapters as NAME=DIGEST, separated by commas, in as many values as Consul's limit requires."""
    texts = [""]
    for adapter in adapters:
        text = f"{adapter.name}={adapter.digest}"
        joined = f"{texts[-1]},{text}" if texts[-1] else text
        if len(joined) <= VALUE_BYTES_MAX:
            texts[-1] = joined
        else:
            texts.append(text)
    return [text for text in texts if text]


def _adapters_of(written: Mapping[str, str]) -> tuple[Adapter, ...]:
    texts = [value for key, value in written.items() if key.startswith(ADAPTERS_KEY)]
    pairs = [part.partition("=") for text in texts for part in text.split(",")]
    if not all(is_name(name) and DIGEST.fullmatch(digest) for name, _, digest in pairs):
        raise ValueError("its adapters cannot be read")
    return tuple(sorted(Adapter(name, digest) for name, _, digest in pairs))


def check_fits(member: Worker | Frontend) -> None:
    """Check that Consul can store every field of a member.

    Raises:
        InvalidRequest: names the field that is too long, as a path from the request.
    """
    for key, value in meta(Record(member=member, owner="")).items():
        size_bytes = len(value.encode())
        if size_bytes > VALUE_BYTES_MAX:
            within = "capabilities." if key in field_names() and isinstance(member, Worker) else ""
            problem = f"has {size_bytes} bytes; Consul stores at most {VALUE_BYTES_MAX}"
            raise InvalidRequest(f"{member.kind}.{within}{key}", problem)


def record_of(address: str, port: int, written: Mapping[str, str]) -> Record:
    """The record in a Consul entry.

    Raises:
        Unreadable: the entry was not written by a registry, or by a newer release, or was altered.
    """
    try:
        return _record_of(join_address(address, port), written)
    except KeyError as missing:
        raise Unreadable(f"its meta has no {missing}") from None
    except ValueError as problem:
        raise Unreadable(str(problem)) from None


def _record_of(address: str, written: Mapping[str, str]) -> Record:
    kind, owner, term = written["kind"], written["keeper"], int(written["term"])
    common: dict[str, Any] = {
        "epoch": int(written["epoch"]),
        "address": address,
        "release": written.get("release", ""),
    }
    if kind == Replica.kind:
        return Record(member=Replica(replica_id=written["id"], **common), owner=owner, term=term)
    is_gone = written["state"] == "gone"
    common["state"] = WorkerState.DRAINING if is_gone else WorkerState(written["state"])
    member: Worker | Frontend
    if kind == Frontend.kind:
        member = Frontend(frontend_id=written["id"], model=written["model"], **common)
    elif kind == Worker.kind:
        member = _worker_of(written, common)
    else:
        raise ValueError(f"unknown kind {kind!r} in its meta")
    return Record(member=member, lease_id=written["lease_id"], owner=owner, term=term, is_gone=is_gone)


def _worker_of(written: Mapping[str, str], common: dict[str, Any]) -> Worker:
    capabilities = Capabilities(**{field.name: _capability(field, written) for field in fields(Capabilities)})
    digest = written.get("capabilities_digest")
    if digest is not None and digest != capabilities_digest(capabilities):
        raise ValueError("its capabilities do not match their digest")
    port = written.get("bootstrap_port")
    return Worker(
        worker_id=written["id"],
        role=WorkerRole(written["role"]),
        # Written since leg contract 2; entries without it are of workers that use contract 1.
        leg_contract=int(written.get("leg_contract", "1")),
        capabilities=capabilities,
        capabilities_digest=digest,
        adapters=_adapters_of(written),
        bootstrap_host=written.get("bootstrap_host"),
        bootstrap_port=None if port is None else int(port),
        **common,
    )


def _capability(field: Any, written: Mapping[str, str]) -> Any:
    """One capability, parsed from its text by its declared type."""
    if field.name not in written and field.default is not MISSING:
        return field.default
    text = written[field.name]
    match field.type:
        case "int":
            return int(text)
        case "bool":
            if text not in ("true", "false"):
                raise ValueError(f"its {field.name} is neither true nor false")
            return text == "true"
        case "tuple[int, ...]":
            return tuple(int(item) for item in text.split(",") if item)
        case _:
            return text
