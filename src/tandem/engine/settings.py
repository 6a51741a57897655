"""What a worker tells its engine at start, whichever adapter it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.domain.worker import WorkerRole


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one engine. Anything SGLang alone understands goes into `extra`."""

    role: WorkerRole
    model_path: Path
    model_name: str
    """The name clients ask for."""
    host: str = "127.0.0.1"
    """Address the engine's own sockets (bootstrap server, NIXL) bind and advertise."""
    bootstrap_port: int = 0
    """Prefill: port of the bootstrap server; 0: one the OS chooses."""
    device: str = "auto"
    """"auto" (CUDA when there is one), "cpu" or "cuda"."""
    dtype: str = "auto"
    """"auto" (as the model says), "float32", "bfloat16" or "float16"."""
    kv_capacity_tokens: int | None = None
    """None: the engine's own choice on a GPU; 16,384 on a CPU."""
    running_requests_max: int = 16
    transfer_backend: str = "nixl"
    """"nixl", or "fake" (SGLang's own, moves nothing: the negative control of the parity tests)."""
    threads: int = 1
    """CPU threads for the engine's arithmetic (OMP_NUM_THREADS); used on a CPU only."""
    seed: int = 0
    log_level: str = "warning"
    extra: dict[str, Any] = field(default_factory=dict)
    """More arguments of `sglang.srt.server_args.ServerArgs`, or of the simulated engine's timing model."""
