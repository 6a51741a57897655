"""What a worker is, what it can do, and when two workers make a pair.

Owns identity, capabilities, load and the compatibility rule. Where workers are kept is the registry's business.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import ClassVar

WORKER_ID_CHARS_MAX = 128
WORKER_ID_PATTERN = f"[A-Za-z0-9._-]{{1,{WORKER_ID_CHARS_MAX}}}"
"""Ids of workers and frontends, in their settings and in the registry."""
LEG_CONTRACT = 2
"""Version of the contract between frontends and workers that this release speaks: protos/tandem/api/worker/v2."""


class WorkerRole(Enum):
    """What a worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class WorkerState(Enum):
    """Where a worker is in its life, as the registry tells it."""

    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do. Everything two legs must agree on to exchange KV is in here.

    `model_digest` covers configuration and weights, `tokenizer_digest` the tokenizer's files; both are hex SHA-256.
    """

    engine: str
    """"sglang" or "simulated"."""
    engine_version: str
    model: str
    """The name clients ask for."""
    model_digest: str
    tokenizer_digest: str
    context_tokens_max: int
    """Prompt plus completion: what the engine really takes, below the model's where its KV memory is smaller."""
    kv_capacity_tokens: int
    running_requests_max: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    page_size_tokens: int
    kv_dtype: str
    kv_layout: str
    """For example "mha:2x2x32": attention kind, layers x KV heads x head dimension."""
    kv_bytes_per_token: int
    transfer_backend: str
    """"nixl", "simulated", or "none" on an aggregated worker."""
    tensor_parallel_size: int = 1
    is_mla: bool = False
    """Multi-head latent attention: lets the two legs differ in tensor parallelism."""


PAIR_FIELDS = (
    "engine",
    "engine_version",
    "model",
    "model_digest",
    "tokenizer_digest",
    "page_size_tokens",
    "kv_dtype",
    "kv_layout",
    "transfer_backend",
)
ANY_PARALLELISM = "any"
"""Stands for every tensor parallelism in a key: of workers with multi-head latent attention."""


def incompatible_field(prefill: Capabilities, decode: Capabilities) -> str | None:
    """Name of the first field in which two workers differ so that they cannot exchange KV; None when they can."""
    for name in PAIR_FIELDS:
        if getattr(prefill, name) != getattr(decode, name):
            return name
    same_parallelism = prefill.tensor_parallel_size == decode.tensor_parallel_size
    if not same_parallelism and not (prefill.is_mla and decode.is_mla):
        return "tensor_parallel_size"
    return None


pair_key: Callable[[Capabilities], tuple[object, ...]] = attrgetter(*PAIR_FIELDS)
"""The values of `PAIR_FIELDS`."""


def offered_keys(prefill: Capabilities) -> tuple[Hashable, ...]:
    """Keys under which an index finds a prefill worker. It can hand over KV to exactly those decode workers that accept
    one of them: the rule of `incompatible_field`, without a comparison of each pair.
    """
    alike = pair_key(prefill)
    own = (alike, prefill.tensor_parallel_size, prefill.is_mla)
    return (own, (alike, ANY_PARALLELISM)) if prefill.is_mla else (own,)


def accepted_keys(decode: Capabilities) -> tuple[Hashable, Hashable]:
    """Keys of the prefill workers that a decode worker can receive KV from; no worker offers both of them."""
    alike, size = pair_key(decode), decode.tensor_parallel_size
    return (alike, size, False), (alike, ANY_PARALLELISM) if decode.is_mla else (alike, size, True)


Start = tuple[str, int]
"""Worker id and epoch: one start of one worker, whatever else is said of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One start of one worker process, as the registry lists it."""

    kind: ClassVar[str] = "worker"

    worker_id: str
    """Stable over restarts, for example "decode-0"."""
    epoch: int
    """Grows with every start of the worker; calls to a worker carry it and a worker refuses another one's."""
    role: WorkerRole
    address: str
    """host:port of its gRPC server."""
    capabilities: Capabilities
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    """Where decode engines meet this prefill worker; prefill only."""
    state: WorkerState = WorkerState.SERVING
    capabilities_digest: str | None = None
    """`capabilities_digest(capabilities)` where it was made; None: not checked."""
    release: str = ""
    """Release of Tandem it runs; empty: unknown."""
    leg_contract: int = 1
    """Version of the leg contract it speaks; only a frontend of the same version sends it legs."""

    @property
    def member_id(self) -> str:
        """Its id, under the name that is common to all members."""
        return self.worker_id

    @property
    def start(self) -> Start:
        """Which start of which worker this is."""
        return self.worker_id, self.epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine is at this moment. A figure the engine does not tell is None, never zero."""

    running_requests: int | None = None
    waiting_requests: int | None = None
    waiting_tokens: int | None = None
    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    transferring_requests: int | None = None
    """Prefill: requests whose KV is on its way or still to be pulled. Decode: requests that wait for KV."""
    kv_transferring_tokens: int | None = None
    """The part of kv_used_tokens whose pages are held for a hand-over alone."""
    kv_cached_tokens: int | None = None
    """Tokens' worth of pages that the prefix cache keeps and no request holds: they can be evicted."""
    kv_free_tokens: int | None = None
    """Tokens' worth of pages that hold nothing. Used, cached and free ones together are the capacity."""


def default_worker_id(role: WorkerRole, address: str) -> str:
    """The name of a worker that was given none."""
    return id_at(role.value, address)


def id_at(kind: str, address: str) -> str:
    """What something is and its address, without what a name may not contain."""
    place = re.sub("[^A-Za-z0-9._-]+", "-", address)
    # Of a host that is too long the end is kept, and with it the port.
    return f"{kind}-{place[-(WORKER_ID_CHARS_MAX - len(kind) - 1) :]}"


def capability_text(value: object) -> str:
    """A capability as text: lists with commas, truth as "true" or "false"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def capabilities_digest(capabilities: Capabilities) -> str:
    """SHA-256, hex, over all capabilities: one line "name=value" and a line feed each, in the contract's order."""
    lines = (f"{name}={capability_text(getattr(capabilities, name))}\n" for name in field_names())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def field_names() -> tuple[str, ...]:
    """Names of all capability fields, in the order of their numbers in the contract."""
    return tuple(f.name for f in fields(Capabilities))
