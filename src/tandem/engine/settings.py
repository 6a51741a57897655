"""Settings that a worker passes to its engine at start, the same for all adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.domain.checkpoint import Checkpoint
from tandem.domain.worker import EMBED, WorkerRole


def embedding_capabilities(settings: EngineSettings, checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of an engine's capabilities that is about embeddings, as keyword arguments; empty: it generates."""
    if settings.task != EMBED:
        return {}
    return {
        "task": EMBED,
        "embedding_size": checkpoint.embedding_size,
        "embedding_sizes": checkpoint.embedding_sizes,
        "is_matryoshka": checkpoint.is_matryoshka,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """What an engine prepares for adapters; it allocates memory for them at its start."""

    rank_max: int
    """Highest rank of an adapter."""
    per_batch_max: int
    """Adapters that one batch may use, beside the model alone."""
    modules: tuple[str, ...]
    """Layers that may be adapted, such as "q_proj"."""


@dataclass(frozen=True, slots=True)
class AdapterPlaces:
    """Where adapters come from, and what the engine can hold."""

    model: Path
    limits: AdapterSettings | None
    """None: this worker has no adapters."""
    root: Path | None
    """Directory of those that are loaded at run time; None: none are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one engine. Anything SGLang alone understands goes into `extra`."""

    role: WorkerRole
    model_path: Path
    model_name: str
    """The model name clients request."""
    task: str = "generate"
    """"generate", or "embed": in the role aggregated only."""
    host: str = "127.0.0.1"
    """Address the engine's own sockets (bootstrap server, NIXL) bind and advertise."""
    bootstrap_port: int = 0
    """Prefill: port of the bootstrap server; 0: any free port."""
    device: str = "auto"
    """"auto" (CUDA if available), "cpu" or "cuda"."""
    dtype: str = "auto"
    """"auto" (the model's), "float32", "bfloat16" or "float16"."""
    kv_capacity_tokens: int | None = None
    """None: the engine's own choice on a GPU; 16,384 on a CPU."""
    running_requests_max: int | None = None
    """None: 16 on a CPU and in the simulated engine; on a GPU 256, or fewer where the KV memory is small."""
    handover_timeout_s: float = 120
    """Decode: how long a leg whose KV memory is granted waits for its KV, the prompt's computation included."""
    kv_check_share: float = 1.0
    """Share of hand-overs, 0 to 1, whose KV decode compares with what prefill sent; of a pair's, the smaller counts."""
    transfer_backend: str = "nixl"
    """"nixl", or "fake" (SGLang's own, transfers nothing: the negative control of the parity tests)."""
    ucx: dict[str, str] = field(default_factory=dict)
    """UCX's variables, with their prefix; they override those of the environment."""
    threads: int = 1
    """CPU threads for the engine's computation (OMP_NUM_THREADS); used on a CPU only."""
    kv_events: bool | None = None
    """Whether the engine reports the changes of its prefix cache, where it can. None: where that costs little."""
    role_switch: bool | None = None
    """Whether the engine prepares to switch between prefill and decode with its weights in place. None: on a CPU."""
    adapters: AdapterSettings | None = None
    """None: the engine loads no adapters."""
    unequal_tp: bool | None = None
    """Whether its KV may be exchanged with an engine of another tensor parallel size. None: on a CPU. The
    engine's own conditions hold in any case."""
    seed: int = 0
    log_level: str = "warning"
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional arguments of `sglang.srt.server_args.ServerArgs`, or `Options` of the simulated engine."""
