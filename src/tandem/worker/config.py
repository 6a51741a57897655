"""Settings of every worker, whatever its role.

Owns names, ranges and defaults. What the engine makes of them is the adapter's business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tandem.config import AdminConfig
from tandem.discovery.addresses import REGISTRY_TEXT, Addresses
from tandem.domain.limits import MODEL_NAME_CHARS_MAX, PORT_MAX
from tandem.domain.worker import WORKER_ID_PATTERN, WorkerRole
from tandem.engine.factory import ENGINES
from tandem.engine.settings import EngineSettings


def _parse_extra(value: Any) -> Any:
    """Flags and variables carry JSON text; a file carries a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as problem:
        raise ValueError(f"is not JSON: {problem}") from None


class WorkerConfig(AdminConfig):
    """Settings every worker has."""

    registry: Addresses = Field(description=REGISTRY_TEXT)
    worker_id: str | None = Field(
        None,
        pattern=f"^{WORKER_ID_PATTERN}$",
        description="name in the registry, stable over restarts; default: role-host-port",
    )
    model: Path = Field(description="model directory in Hugging Face format")
    model_name: str | None = Field(
        None,
        min_length=1,
        max_length=MODEL_NAME_CHARS_MAX,
        description="name clients ask for; default: the directory's",
    )
    engine: str = Field("sglang", pattern=f"^({'|'.join(ENGINES)})$", description=" or ".join(ENGINES))
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$", description="auto, cpu or cuda")
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="auto (the model's), float32, bfloat16, float16",
    )
    kv_capacity_tokens: int | None = Field(
        None, ge=64, description="tokens whose KV is kept; default: what fits on a GPU, 16384 on a CPU"
    )
    running_requests_max: int = Field(16, ge=1, le=4096, description="requests the engine runs at the same time")
    threads: int = Field(1, ge=1, le=256, description="threads of the engine's arithmetic on a CPU")
    transfer_backend: str = Field(
        "nixl", pattern="^(nixl|fake)$", description="nixl; fake moves no KV at all and is only for negative controls"
    )
    bootstrap_port: int = Field(0, ge=0, le=PORT_MAX, description="port of the bootstrap server (prefill); 0: any")
    seed: int = Field(0, ge=0, description="seed of the engine")
    canary_period_s: float = Field(
        10, ge=0.5, le=3600, description="an engine that has told no token for this long must pass a canary"
    )
    canary_timeout_s: float = Field(60, gt=0, le=600, description="most time for the generation that proves the engine")
    engine_spans: bool = Field(
        False, description="trace also what SGLang itself traces; its scheduler's loop pays for that"
    )
    engine_extra: Annotated[dict[str, Any], BeforeValidator(_parse_extra)] = Field(
        default_factory=dict, description="more arguments of the engine, as a JSON object"
    )

    @property
    def served_name(self) -> str:
        """Name clients ask for."""
        return self.model_name or self.model.resolve().name

    def _engine_tracing(self) -> dict[str, Any]:
        """SGLang's arguments for spans of its own."""
        if not self.engine_spans or self.otlp_endpoint is None or self.engine != "sglang":
            return {}
        return {
            "enable_trace": True,
            "otlp_traces_endpoint": self.otlp_endpoint.partition("://")[2],
            "otlp_service_name": "tandem-engine",
        }

    def engine_settings(self, role: WorkerRole) -> EngineSettings:
        """The engine's part."""
        return EngineSettings(
            role=role,
            model_path=self.model,
            model_name=self.served_name,
            host=self.reachable_host,
            bootstrap_port=self.bootstrap_port,
            device=self.device,
            dtype=self.dtype,
            kv_capacity_tokens=self.kv_capacity_tokens,
            running_requests_max=self.running_requests_max,
            transfer_backend=self.transfer_backend,
            threads=self.threads,
            seed=self.seed,
            log_level=self.log_level if self.log_level != "info" else "warning",
            extra={**self._engine_tracing(), **self.engine_extra},
        )
