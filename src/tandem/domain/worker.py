"""A worker's identity, capabilities and load, and the rule for which two workers can form a pair.

Pure value types; the registry stores them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import ClassVar

from tandem.domain.adapter import Adapter

WORKER_ID_CHARS_MAX = 128
WORKER_ID_PATTERN = f"[A-Za-z0-9._-]{{1,{WORKER_ID_CHARS_MAX}}}"
"""Ids of workers and frontends, in their settings and in the registry."""
EMBED = "embed"
"""`task` of a worker whose model computes embeddings and generates nothing."""
LEG_CONTRACT = 2
"""Version of the contract between frontends and workers that this release speaks: protos/tandem/api/worker/v2."""


class WorkerRole(Enum):
    """Which legs a worker runs."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class WorkerState(Enum):
    """Lifecycle state of a worker, as published by the registry."""

    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """An engine's capabilities, including every property that two legs must agree on to exchange KV.

    `model_digest` covers configuration and weights, `tokenizer_digest` the tokenizer's files; both are hex SHA-256.
    """

    engine: str
    """"sglang" or "simulated"."""
    engine_version: str
    model: str
    """The model name clients request."""
    model_digest: str
    tokenizer_digest: str
    context_tokens_max: int
    """Prompt plus completion that the engine accepts; below the model's own limit if the KV memory is smaller."""
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
    """Multi-head latent attention: the two legs may differ in tensor parallelism."""
    task: str = ""
    """EMBED, or empty: it generates."""
    embedding_size: int = 0
    """Numbers in an embedding; 0: it computes none."""
    embedding_sizes: tuple[int, ...] = ()
    """Sizes to which an embedding may be shortened; empty: any, if `is_matryoshka`."""
    is_matryoshka: bool = False
    unequal_tp: bool = False
    """Whether its KV can be exchanged with an engine of another tensor parallel size that says so too."""

    @property
    def takes_any_tp(self) -> bool:
        """Whether the other leg may have another tensor parallel size, if the same is true of it."""
        return self.is_mla or self.unequal_tp

    @property
    def embeds(self) -> bool:
        """Whether the model computes embeddings, and generates nothing."""
        return self.task == EMBED


EMBEDDING_FIELDS = ("task", "embedding_size", "embedding_sizes", "is_matryoshka")
UNDIGESTED_FIELD = "unequal_tp"
"""Without it a pair is refused, which harms nothing: registries that drop it need not refuse the worker."""
LATER_FIELDS = (*EMBEDDING_FIELDS, UNDIGESTED_FIELD)
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
"""Wildcard for tensor parallelism in the key of workers that take any."""


def incompatible_field(prefill: Capabilities, decode: Capabilities) -> str | None:
    """Name of the first field whose difference prevents two workers from exchanging KV; None if they can."""
    for name in PAIR_FIELDS:
        if getattr(prefill, name) != getattr(decode, name):
            return name
    same_parallelism = prefill.tensor_parallel_size == decode.tensor_parallel_size
    if not same_parallelism and not (prefill.takes_any_tp and decode.takes_any_tp):
        return "tensor_parallel_size"
    return None


pair_key: Callable[[Capabilities], tuple[object, ...]] = attrgetter(*PAIR_FIELDS)
"""The values of `PAIR_FIELDS`."""


def offered_keys(prefill: Capabilities) -> tuple[Hashable, ...]:
    """Keys under which an index lists a prefill worker. It can send KV to exactly those decode workers that accept one
    of them: the rule of `incompatible_field`, without comparing each pair.
    """
    alike = pair_key(prefill)
    own = (alike, prefill.tensor_parallel_size, prefill.takes_any_tp)
    return (own, (alike, ANY_PARALLELISM)) if prefill.takes_any_tp else (own,)


def accepted_keys(decode: Capabilities) -> tuple[Hashable, Hashable]:
    """Keys of the prefill workers that a decode worker can receive KV from; no prefill worker offers both."""
    alike, size = pair_key(decode), decode.tensor_parallel_size
    return (alike, size, False), (alike, ANY_PARALLELISM) if decode.takes_any_tp else (alike, size, True)


Start = tuple[str, int]
"""Worker id and epoch: identifies one incarnation of a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One incarnation of a worker process, as the registry lists it."""

    kind: ClassVar[str] = "worker"

    worker_id: str
    """Stable across restarts, for example "decode-0"."""
    epoch: int
    """Increases with every start of the worker; a worker rejects calls that carry another epoch."""
    role: WorkerRole
    address: str
    """host:port of its gRPC server."""
    capabilities: Capabilities
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    """Bootstrap server, to which decode engines connect; prefill workers only."""
    state: WorkerState = WorkerState.SERVING
    capabilities_digest: str | None = None
    """`capabilities_digest(capabilities)` as computed by the worker; None: not checked."""
    release: str = ""
    """Tandem release it runs; empty: unknown."""
    leg_contract: int = 1
    """Version of the leg contract it speaks; only a frontend of the same version sends it legs."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters that it serves beside its model, ordered by name. They change within one epoch."""

    @property
    def member_id(self) -> str:
        """`worker_id`, under the name that all kinds of members share."""
        return self.worker_id

    @property
    def start(self) -> Start:
        """Worker id and epoch."""
        return self.worker_id, self.epoch


@dataclass(frozen=True, slots=True)
class UnfinishedPrompts:
    """The prompts that a worker has accepted and not computed yet, of all frontends."""

    count: int = 0
    tokens: int = 0
    """Without those that were expected in its prefix cache; of a prompt that is partly computed all."""
    in_hand_s: float = 0.0
    """Seconds since it has the first of them in hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """The load of an engine at this moment. A value that the engine does not report is None, never zero."""

    running_requests: int | None = None
    waiting_requests: int | None = None
    waiting_tokens: int | None = None
    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    transferring_requests: int | None = None
    """Prefill: requests whose KV is being transferred or waits for it. Decode: requests that wait for KV."""
    kv_transferring_tokens: int | None = None
    """The part of kv_used_tokens whose pages are held only for a KV transfer."""
    kv_cached_tokens: int | None = None
    """Pages, in tokens, that only the prefix cache holds: they can be evicted."""
    kv_free_tokens: int | None = None
    """Empty pages, in tokens. Used + cached + free = capacity."""
    computed_tokens: int | None = None
    """Prompt tokens of ended legs that were not in the prefix cache, since the start of the worker. Counted by the
    worker: an engine's own load has none."""
    unfinished: UnfinishedPrompts | None = None
    """Counted by the worker too; None: it computes no prompts, or is of a release that does not count them."""


def default_worker_id(role: WorkerRole, address: str) -> str:
    """Id of a worker for which none is configured: role and address."""
    return id_at(role.value, address)


def id_at(kind: str, address: str) -> str:
    """`kind`-`address`, with characters that an id may not contain replaced by "-"."""
    suffix = re.sub("[^A-Za-z0-9._-]+", "-", address)
    # Too long an address is cut at its start: the end has the port, which makes the id unique.
    return f"{kind}-{suffix[-(WORKER_ID_CHARS_MAX - len(kind) - 1) :]}"


def capability_text(value: object) -> str:
    """A capability as text: list items joined by commas, booleans as "true" or "false"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def capabilities_digest(capabilities: Capabilities) -> str:
    """SHA-256, hex, over `written_fields` but one: "name=value" and a line feed each, in the order of their numbers."""
    names = [name for name in written_fields(capabilities) if name != UNDIGESTED_FIELD]
    lines = (f"{name}={capability_text(getattr(capabilities, name))}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def written_fields(capabilities: Capabilities) -> tuple[str, ...]:
    """Names of the fields that are stored: without those that a former release did not have where they say nothing.

    Registries of releases before them know the others only, and refuse a worker whose digest has more.
    """
    return tuple(name for name in field_names() if name not in LATER_FIELDS or getattr(capabilities, name))


def field_names() -> tuple[str, ...]:
    """Names of all capability fields, in the order of their protobuf field numbers."""
    return tuple(f.name for f in fields(Capabilities))
