"""Settings of every worker, whatever its role.

Owns names, ranges and defaults. The engine adapter maps them to the engine's own arguments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from tandem.config import AdminConfig
from tandem.discovery.addresses import REGISTRY_TEXT, Addresses
from tandem.domain.limits import MODEL_NAME_CHARS_MAX, PORT_MAX
from tandem.domain.network_address import is_any_host
from tandem.domain.worker import WORKER_ID_PATTERN, WorkerRole
from tandem.engine.factory import ENGINES
from tandem.engine.settings import EngineSettings
from tandem.errors import ConfigError


def _parse_extra(value: Any) -> Any:
    """Flags and variables carry JSON text; a file carries a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as problem:
        raise ValueError(f"is not JSON: {problem}") from None


_ROLE = "|".join(role.value for role in WorkerRole)


class WorkerConfig(AdminConfig):
    """Settings every worker has."""

    registry: Addresses = Field(description=REGISTRY_TEXT)
    roles: str = Field(
        ",".join(role.value for role in WorkerRole),
        pattern=f"^({_ROLE})(,({_ROLE}))*$",
        description="roles that this worker may take while it runs (`tandem role`), separated by commas; the one it "
        "starts with is always allowed",
    )
    worker_id: str | None = Field(
        None,
        pattern=f"^{WORKER_ID_PATTERN}$",
        description="id in the registry, stable over restarts; default: ROLE-HOST-PORT",
    )
    model: Path = Field(description="model directory in Hugging Face format")
    model_name: str | None = Field(
        None,
        min_length=1,
        max_length=MODEL_NAME_CHARS_MAX,
        description="model name that clients send; default: the directory's name",
    )
    engine: str = Field(
        "sglang",
        pattern=f"^({'|'.join(ENGINES)})$",
        description="sglang, the real engine; or simulated, an engine of hashes and timers that computes no model",
    )
    device: str = Field(
        "auto", pattern="^(auto|cpu|cuda)$", description="where the engine computes; auto: a GPU if there is one"
    )
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="number format of weights and KV; auto: the model's",
    )
    kv_capacity_tokens: int | None = Field(
        None, ge=64, description="KV cache capacity in tokens; default: what fits on a GPU, 16384 on a CPU"
    )
    running_requests_max: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="requests that the engine runs at the same time; further ones wait. Default: 16 on a CPU; on a GPU "
        "256, or fewer where the KV memory is small",
    )
    threads: int = Field(
        1, ge=1, le=256, description="CPU threads of the engine's computation; used with device cpu only"
    )
    transfer_backend: str = Field(
        "nixl", pattern="^(nixl|fake)$", description="what moves the KV; fake moves none and is for tests only"
    )
    ucx_net_devices: str | None = Field(
        None,
        min_length=1,
        description="network devices that carry KV, separated by commas, such as eth1 or mlx5_0:1; default: lo on "
        "loopback, else UCX's choice",
    )
    ucx_tls: str | None = Field(
        None,
        min_length=1,
        description="transports that UCX may use for KV, separated by commas, such as tcp or rc,cuda_copy,cuda_ipc; "
        "default: all",
    )
    ucx_extra: Annotated[dict[str, Any], BeforeValidator(_parse_extra)] = Field(
        default_factory=dict,
        description="further settings of UCX by the name of its variable without UCX_, such as IB_GID_INDEX",
    )
    bootstrap_port: int = Field(
        0,
        ge=0,
        le=PORT_MAX,
        description="port of the prefill engine's bootstrap server, where decode engines connect; 0: any free port",
    )
    handover_timeout_s: float = Field(
        120,
        ge=1,
        le=3600,
        description="seconds within which a decode worker must have a prompt's KV, its computation included",
    )
    kv_check_share: float = Field(
        1,
        ge=0,
        le=1,
        description="share of hand-overs whose KV is compared with what the prefill engine sent, by a digest that both "
        "engines compute; of a pair's two settings the smaller counts. 0: none",
    )
    kv_events: bool | None = Field(
        None,
        description="report the changes of the engine's prefix cache, by which frontends route; default: where it has "
        "one, with pages of at least 16 tokens",
    )
    role_switch: bool | None = Field(
        None,
        description="prepare to change between prefill and decode with the weights in place; otherwise a role change "
        "starts another engine in this process. Default: on a CPU",
    )
    seed: int = Field(0, ge=0, description="random seed of the engine; a request may give its own")
    canary_period_s: float = Field(
        10, ge=0.5, le=3600, description="seconds without an output token before the engine must pass a canary"
    )
    canary_timeout_s: float = Field(60, gt=0, le=600, description="timeout of a canary generation, in seconds")
    engine_spans: bool = Field(False, description="also export SGLang's own spans; slows down its scheduler loop")
    engine_extra: Annotated[dict[str, Any], BeforeValidator(_parse_extra)] = Field(
        default_factory=dict,
        description="further arguments of the engine: SGLang's ServerArgs, or options of the simulated engine",
    )

    @model_validator(mode="after")
    def _ucx_has_names(self) -> Self:
        """Checked at start: UCX ignores a variable that it does not know."""
        self._ucx()
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        """Reject a worker that no caller can find, before it loads a model for minutes."""
        if is_any_host(self.reachable_host):
            raise ConfigError(
                "advertise_host",
                f"must be the address or name of this host for the others, not {self.reachable_host}, "
                "which stands for every address",
            )
        return self

    def allowed_roles(self, first: WorkerRole) -> tuple[WorkerRole, ...]:
        """`roles` and the one the worker starts with, in the order of the enumeration."""
        return tuple(role for role in WorkerRole if role is first or role.value in self.roles.split(","))

    @property
    def served_name(self) -> str:
        """The model name clients request."""
        return self.model_name or self.model.resolve().name

    def _ucx(self) -> dict[str, str]:
        """Settings of UCX, by the name of its variable.

        Raises:
            ConfigError: a name is none that UCX could have, or is set twice.
        """
        given = {"NET_DEVICES": self.ucx_net_devices, "TLS": self.ucx_tls}
        for name, value in self.ucx_extra.items():
            if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name.startswith("UCX_"):
                raise ConfigError(f"ucx_extra.{name}", "must be the name of a variable of UCX, without UCX_")
            if name in given:
                raise ConfigError(f"ucx_extra.{name}", f"has a setting of its own, ucx_{name.lower()}")
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise ConfigError(f"ucx_extra.{name}", "must be text or a number; UCX's switches are y and n")
        values = {**given, **self.ucx_extra}
        return {f"UCX_{name}": str(value) for name, value in values.items() if value is not None}

    def _engine_tracing(self) -> dict[str, Any]:
        """SGLang's arguments that make it export its own spans."""
        if not self.engine_spans or self.otlp_endpoint is None or self.engine != "sglang":
            return {}
        return {
            "enable_trace": True,
            "otlp_traces_endpoint": self.otlp_endpoint.partition("://")[2],
            "otlp_service_name": "tandem-engine",
        }

    def engine_settings(self, role: WorkerRole) -> EngineSettings:
        """The subset of these settings that the engine needs, for a worker in `role`."""
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
            handover_timeout_s=self.handover_timeout_s,
            kv_check_share=self.kv_check_share,
            transfer_backend=self.transfer_backend,
            ucx=self._ucx(),
            threads=self.threads,
            kv_events=self.kv_events,
            role_switch=self.role_switch,
            seed=self.seed,
            # SGLang logs every batch at "info", which would bury the worker's own log.
            log_level=self.log_level if self.log_level != "info" else "warning",
            extra={**self._engine_tracing(), **self.engine_extra},
        )
