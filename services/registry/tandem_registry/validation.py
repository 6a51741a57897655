"""Checks every field of a registration before the member enters the view.

Owns the rules and the dotted names of invalid fields. Conflicts with other members are checked in `leases`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from tandem.api.registry.v1 import registry_service_pb2
from tandem.api.types.v1 import worker_pb2
from tandem.domain.adapter import ADAPTERS_MAX, DIGEST, NAME_RULE, Adapter, is_name
from tandem.domain.frontend import Frontend
from tandem.domain.limits import MODEL_NAME_CHARS_MAX, PORT_MAX
from tandem.domain.worker import (
    EMBED,
    WORKER_ID_CHARS_MAX,
    WORKER_ID_PATTERN,
    Worker,
    WorkerRole,
    WorkerState,
    capabilities_digest,
)
from tandem.errors import InvalidRequest
from tandem.rpc.convert import (
    ROLE_BY_NUMBER,
    STATE_BY_NUMBER,
    adapter_from_proto,
    frontend_from_proto,
    worker_from_proto,
)

WORKER_ID = re.compile(WORKER_ID_PATTERN, re.ASCII)
HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.%]{2,64}\]", re.ASCII)
WILDCARD_HOSTS = ("0.0.0.0", "[::]")
RELEASE_CHARACTERS_MAX = 64
LEASE_ID_CHARACTERS_MAX = 128
HOST_CHARACTERS_MAX = 253


def checked_worker(message: worker_pb2.Worker) -> Worker:
    """The worker of a request.

    Raises:
        InvalidRequest: names the first invalid field, as a path from the request ("worker.address").
    """
    _check_start("worker", "worker.worker_id", message.worker_id, message)
    if message.role not in ROLE_BY_NUMBER:
        raise InvalidRequest("worker.role", "must be PREFILL, DECODE or AGGREGATED")
    if not message.HasField("capabilities"):
        raise InvalidRequest("worker.capabilities", "must be given")
    _check_model("worker.capabilities.model", message.capabilities.model)
    _check_bootstrap(message)
    _check_task(message)
    if message.HasField("leg_contract") and message.leg_contract < 1:
        raise InvalidRequest("worker.leg_contract", f"must be at least 1, not {message.leg_contract}")
    worker = replace(worker_from_proto(message), adapters=checked_adapters("worker.adapters", message))
    if worker.capabilities_digest is not None and worker.capabilities_digest != capabilities_digest(
        worker.capabilities
    ):
        raise InvalidRequest(
            "worker.capabilities_digest",
            "does not match worker.capabilities, so the worker is not registered: run the registry's release on it",
        )
    return worker


def checked_adapters(field: str, message: registry_service_pb2.AdapterList | worker_pb2.Worker) -> tuple[Adapter, ...]:
    """The adapters of a worker, ordered by name; `field` is the path of their list in the request."""
    adapters = tuple(sorted(map(adapter_from_proto, message.adapters)))
    if len(adapters) > ADAPTERS_MAX:
        raise InvalidRequest(field, f"must be at most {ADAPTERS_MAX}, not {len(adapters)}")
    if not all(is_name(adapter.name) for adapter in adapters):
        raise InvalidRequest(f"{field}.name", NAME_RULE)
    if not all(DIGEST.fullmatch(adapter.digest) for adapter in adapters):
        raise InvalidRequest(f"{field}.digest", "must be 64 hex digits")
    if len({adapter.name for adapter in adapters}) != len(adapters):
        raise InvalidRequest(f"{field}.name", "must be of one adapter only")
    return adapters


def checked_frontend(message: worker_pb2.Frontend) -> Frontend:
    """The frontend of a request.

    Raises:
        InvalidRequest: names the first invalid field, as a path from the request ("frontend.address").
    """
    _check_start("frontend", "frontend.frontend_id", message.frontend_id, message)
    _check_model("frontend.model", message.model)
    return frontend_from_proto(message)


def checked_worker_id(field: str, worker_id: str) -> str:
    """A valid worker or frontend id; `field` is its name in the request, for the error."""
    if not WORKER_ID.fullmatch(worker_id):
        raise InvalidRequest(field, f"must be 1 to {WORKER_ID_CHARS_MAX} characters of a-z, A-Z, 0-9, '.', '_', '-'")
    return worker_id


def checked_epoch(field: str, epoch: int) -> int:
    """A valid epoch: at least 1."""
    if epoch <= 0:
        raise InvalidRequest(field, f"must be at least 1, not {epoch}")
    return epoch


def checked_lease_id(lease_id: str) -> str:
    """A valid lease id."""
    if not 1 <= len(lease_id) <= LEASE_ID_CHARACTERS_MAX:
        raise InvalidRequest("lease_id", f"must be 1 to {LEASE_ID_CHARACTERS_MAX} characters long")
    return lease_id


def checked_state(number: int) -> WorkerState | None:
    """The state in a keep-alive; None when it is not set."""
    if number == worker_pb2.WORKER_STATE_UNSPECIFIED:
        return None
    if number not in STATE_BY_NUMBER:
        raise InvalidRequest("state", "must be SERVING or DRAINING if set")
    return STATE_BY_NUMBER[worker_pb2.WorkerState.ValueType(number)]


def _check_start(path: str, id_path: str, member_id: str, message: worker_pb2.Worker | worker_pb2.Frontend) -> None:
    checked_worker_id(id_path, member_id)
    checked_epoch(f"{path}.epoch", message.epoch)
    if message.state not in STATE_BY_NUMBER:
        raise InvalidRequest(f"{path}.state", "must be SERVING or DRAINING")
    _check_address(f"{path}.address", message.address)
    if len(message.release) > RELEASE_CHARACTERS_MAX:
        raise InvalidRequest(f"{path}.release", f"must be at most {RELEASE_CHARACTERS_MAX} characters long")


def _check_address(field: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= PORT_MAX:
        raise InvalidRequest(field, f"must be host:port with a port of 1 to {PORT_MAX}")
    if host in WILDCARD_HOSTS:
        raise InvalidRequest(field, f"{host} is a wildcard address, which clients cannot call: set advertise_host")


def _check_model(field: str, model: str) -> None:
    if not 1 <= len(model) <= MODEL_NAME_CHARS_MAX:
        raise InvalidRequest(field, f"must be 1 to {MODEL_NAME_CHARS_MAX} characters long")
    if not model.isprintable():
        # It is printed on terminals and in logs.
        raise InvalidRequest(field, "must have printable characters only")


def _check_task(message: worker_pb2.Worker) -> None:
    """A task that this release does not know would be taken for generating."""
    task = message.capabilities.task
    if task not in ("", EMBED):
        raise InvalidRequest("worker.capabilities.task", f"must be {EMBED} or empty: it generates")
    if task == EMBED and ROLE_BY_NUMBER[message.role] is not WorkerRole.AGGREGATED:
        raise InvalidRequest("worker.role", "must be AGGREGATED for a model that computes embeddings")
    if (task == EMBED) != (message.capabilities.embedding_size >= 1):
        raise InvalidRequest("worker.capabilities.embedding_size", f"must be at least 1 with the task {EMBED}, else 0")


def _check_bootstrap(message: worker_pb2.Worker) -> None:
    role, has_bootstrap = ROLE_BY_NUMBER[message.role], message.HasField("bootstrap")
    if role is not WorkerRole.PREFILL:
        if has_bootstrap:
            raise InvalidRequest("worker.bootstrap", f"must be absent on a worker of role {role.value}")
        return
    if not has_bootstrap:
        raise InvalidRequest("worker.bootstrap", "must be given on a worker of role prefill")
    if not 1 <= len(message.bootstrap.host) <= HOST_CHARACTERS_MAX:
        raise InvalidRequest("worker.bootstrap.host", f"must be 1 to {HOST_CHARACTERS_MAX} characters long")
    if not 1 <= message.bootstrap.port <= PORT_MAX:
        raise InvalidRequest("worker.bootstrap.port", f"must be 1 to {PORT_MAX}, not {message.bootstrap.port}")
