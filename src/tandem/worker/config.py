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
from tandem.domain.adapter import ADAPTERS_MAX, NAME_RULE, is_name
from tandem.domain.limits import MODEL_NAME_CHARS_MAX, PORT_MAX
from tandem.domain.network_address import is_any_host
from tandem.domain.worker import EMBED, WORKER_ID_PATTERN, WorkerRole
from tandem.engine.factory import ENGINES
from tandem.engine.settings import AdapterPlaces, AdapterSettings, EngineSettings
from tandem.errors import ConfigError


def _parse_extra(value: Any) -> Any:
    """Flags and variables carry JSON text; a file carries a table."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as problem:
        raise ValueError(f"is not JSON: {problem}") from None


def _parse_adapters(value: Any) -> Any:
    """A dict from "name=directory,name=directory", or the same as a table."""
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",")] if value else []
        value = {name: path for name, _, path in pairs}
        if len(value) != len(pairs):
            raise ValueError("must have each name once")
    if isinstance(value, dict) and len(value) > ADAPTERS_MAX:
        raise ValueError(f"must be at most {ADAPTERS_MAX}, not {len(value)}")
    for name, path in value.items() if isinstance(value, dict) else ():
        if not is_name(str(name)) or not path:
            raise ValueError(f"must be NAME=DIRECTORY, several separated by commas; a name {NAME_RULE}")
    return value


ADAPTER_RANK_MAX = 16
ADAPTER_MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"

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
    task: str = Field(
        "generate",
        pattern="^(generate|embed)$",
        description="what the model does: generate, or embed (it computes embeddings; role aggregated only)",
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
    adapters: Annotated[dict[str, Path], BeforeValidator(_parse_adapters)] = Field(
        default_factory=dict,
        description="LoRA adapters that are served from the start, as NAME=DIRECTORY; several are separated by commas. "
        "Clients request one by its name, as a model",
    )
    adapter_root: Path | None = Field(
        None,
        description="directory below which adapters may be loaded while the worker runs (`tandem adapter`); default: "
        "none may be",
    )
    adapter_rank_max: int = Field(
        ADAPTER_RANK_MAX,
        ge=1,
        le=512,
        description="highest rank of an adapter; the engine reserves memory for it. Used with adapters or adapter_root",
    )
    adapters_per_batch: int = Field(
        8,
        ge=1,
        le=ADAPTERS_MAX,
        description="adapters that the engine uses at the same time, beside the model alone; requests of further ones "
        "wait. It reserves memory for each",
    )
    adapter_modules: str = Field(
        ADAPTER_MODULES,
        pattern="^[a-z_]+(,[a-z_]+)*$",
        description="layers that adapters may change, separated by commas",
    )
    unequal_tp: bool | None = Field(
        None,
        description="exchange KV with workers of another tensor parallel size, if they do so too. Default: on a CPU, "
        "where it was tried; not on a GPU",
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
        """`roles` and the one the worker starts with, in the order of the enumeration; only that one if it embeds."""
        if self.task == EMBED:
            return (first,)
        return tuple(role for role in WorkerRole if role is first or role.value in self.roles.split(","))

    @property
    def served_name(self) -> str:
        """The model name clients request."""
        return self.model_name or self.model.resolve().name

    @property
    def adapter_places(self) -> AdapterPlaces:
        """Where adapters come from, and what the engine can hold."""
        limits = None
        if self.adapters or self.adapter_root is not None:
            limits = AdapterSettings(
                rank_max=self.adapter_rank_max,
                per_batch_max=self.adapters_per_batch,
                modules=tuple(self.adapter_modules.split(",")),
            )
        return AdapterPlaces(self.model, limits, self.adapter_root)

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
        """The subset of these settings that the engine needs, for a worker in `role`.

        Raises:
            ConfigError: no engine with them can have the role.
        """
        if self.task == EMBED and role is not WorkerRole.AGGREGATED:
            raise ConfigError("task", f"embed needs the role aggregated, not {role.value}: there is no KV to hand over")
        if self.task == EMBED and self.adapters:
            raise ConfigError("adapters", "must be empty with task embed: requests for embeddings use no adapter")
        return EngineSettings(
            role=role,
            model_path=self.model,
            model_name=self.served_name,
            task=self.task,
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
            adapters=self.adapter_places.limits,
            unequal_tp=self.unequal_tp,
            seed=self.seed,
            # SGLang logs every batch at "info", which would bury the worker's own log.
            log_level=self.log_level if self.log_level != "info" else "warning",
            extra={**self._engine_tracing(), **self.engine_extra},
        )
