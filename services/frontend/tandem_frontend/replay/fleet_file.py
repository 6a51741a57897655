"""The fleet of a replay: its file, in TOML or JSON, and the workers that it describes.

Owns the fields, their ranges and defaults. A wrong field is refused by its dotted name.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from tandem.config_errors import sentence
from tandem.domain.worker import LEG_CONTRACT, Capabilities, Worker, WorkerRole
from tandem.engine.simulated.options import Options, parse_options
from tandem.errors import ConfigError
from tandem_frontend.routing.local_prefill import MAX_TOKENS, SHARE

MODEL = "replayed"
DIGEST = "0" * 64
UNLIMITED_TOKENS = 2**50
"""Memory of an engine whose cache has no limit."""
WORKERS_MAX = 1024


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PromptWorkers(_Section):
    """Prefill workers, or aggregated ones."""

    count: int = Field(0, ge=0, le=WORKERS_MAX, description="number of workers")
    cache_blocks: int | None = Field(
        None,
        ge=1,
        le=2**31,
        description="blocks of KV memory: prompts in progress and the prefix cache; default: no limit",
    )
    running_requests_max: int = Field(256, ge=1, le=2**20, description="requests that generate at a time in one worker")


class DecodeWorkers(_Section):
    """Decode workers."""

    count: int = Field(0, ge=0, le=WORKERS_MAX, description="number of workers")
    kv_capacity_tokens: int = Field(4_000_000, ge=1, le=2**40, description="KV memory of one worker")
    running_requests_max: int = Field(256, ge=1, le=2**20, description="requests that generate at a time in one worker")


class Frontends(_Section):
    """The frontends, and how old what they know may be."""

    count: int = Field(1, ge=1, le=256, description="number of frontends; requests go to them in turn")
    load_interval_s: float = Field(0.25, gt=0, le=60, description="seconds between two load reports of a worker")
    change_interval_s: float = Field(
        0.02, ge=0, le=60, description="least seconds between two reports of changed prompts; 0: none are sent"
    )
    event_delay_s: float = Field(0.05, ge=0, le=60, description="seconds until a frontend knows a cache's change")
    prefill_queue_s: float = Field(5.0, gt=0, le=3600, description="as the frontend's setting of that name")
    local_prefill: bool = Field(True, description="as the frontend's setting of that name")
    local_prefill_max_tokens: int = Field(
        MAX_TOKENS, ge=0, le=10_000_000, description="as the frontend's setting of that name"
    )
    local_prefill_share: float = Field(SHARE, gt=0, le=1, description="as the frontend's setting of that name")
    open_requests_max: int = Field(
        100_000,
        ge=1,
        le=10**9,
        description="as the frontend's setting of that name; here so large that each policy serves the same requests",
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        for name in ("local_prefill_max_tokens", "local_prefill_share"):
            if name in self.model_fields_set and not self.local_prefill:
                raise ConfigError(f"frontend.{name}", "requires local_prefill")
        return self


class FleetFile(_Section):
    """A whole file."""

    block_tokens: int = Field(512, ge=1, le=65_536, description="tokens of one block of the trace")
    kv_bytes_per_token: int = Field(131_072, ge=1, le=2**30, description="what a hand-over moves for each prompt token")
    prefill: PromptWorkers = PromptWorkers()
    decode: DecodeWorkers = DecodeWorkers()
    aggregated: PromptWorkers = PromptWorkers()
    frontend: Frontends = Frontends()
    engine: dict[str, Any] = Field(
        default_factory=dict, description="options of the simulated engine: a profile, speeds, the link, jitter"
    )

    @model_validator(mode="after")
    def _some_worker_streams(self) -> Self:
        if (self.prefill.count == 0) != (self.decode.count == 0):
            missing = "decode" if self.prefill.count else "prefill"
            raise ConfigError(f"{missing}.count", "must be at least 1: prefill and decode workers serve in pairs")
        if not self.prefill.count and not self.aggregated.count:
            raise ConfigError("prefill.count", "must be at least 1, or aggregated.count: the fleet has no workers")
        return self

    @property
    def prompt_workers_count(self) -> int:
        """Workers that compute prompts."""
        return self.prefill.count + self.aggregated.count

    def options(self) -> Options:
        """The engines' options.

        Raises:
            ConfigError: names the option as `engine.<key>`.
        """
        try:
            return parse_options(self.engine)
        except ConfigError as problem:
            key = problem.key.replace("engine_extra.", "engine.")
            raise ConfigError(key, problem.message.removeprefix(f"{problem.key}: ")) from None

    def workers(self) -> tuple[Worker, ...]:
        """The workers, as a registry would list them."""
        return tuple(
            worker
            for role, count, tokens, running in (
                (WorkerRole.PREFILL, self.prefill.count, self._tokens(self.prefill), 256),
                (
                    *(WorkerRole.DECODE, self.decode.count, self.decode.kv_capacity_tokens),
                    self.decode.running_requests_max,
                ),
                (
                    *(WorkerRole.AGGREGATED, self.aggregated.count, self._tokens(self.aggregated)),
                    self.aggregated.running_requests_max,
                ),
            )
            for worker in (self._worker(role, number, tokens, running) for number in range(count))
        )

    def in_role(self, worker: Worker, role: WorkerRole) -> Worker:
        """A worker of this fleet after it has taken another role: the next start, with that role's memory."""
        number = int(worker.worker_id.rpartition("-")[2])
        section = {WorkerRole.PREFILL: self.prefill, WorkerRole.AGGREGATED: self.aggregated}.get(role)
        tokens = self.decode.kv_capacity_tokens if section is None else self._tokens(section)
        running = self.decode.running_requests_max if section is None else section.running_requests_max
        taken = self._worker(role, number, tokens, running)
        return replace(taken, worker_id=worker.worker_id, address=worker.address, epoch=worker.epoch + 1)

    def _tokens(self, section: PromptWorkers) -> int:
        return UNLIMITED_TOKENS if section.cache_blocks is None else section.cache_blocks * self.block_tokens

    def _worker(self, role: WorkerRole, number: int, kv_tokens: int, running: int) -> Worker:
        port = 1 + number
        return Worker(
            worker_id=f"{role.value}-{number}",
            epoch=1,
            role=role,
            address=f"{role.value}-{number}:{port}",
            bootstrap_host="prefill" if role is WorkerRole.PREFILL else None,
            bootstrap_port=port if role is WorkerRole.PREFILL else None,
            leg_contract=LEG_CONTRACT,
            capabilities=Capabilities(
                engine="simulated",
                engine_version="replay",
                model=MODEL,
                model_digest=DIGEST,
                tokenizer_digest=DIGEST,
                context_tokens_max=kv_tokens,
                kv_capacity_tokens=kv_tokens,
                running_requests_max=running,
                vocabulary_size=2,
                eos_token_ids=(1,),
                page_size_tokens=self.block_tokens,
                kv_dtype="bfloat16",
                kv_layout="replay",
                kv_bytes_per_token=self.kv_bytes_per_token,
                transfer_backend="none" if role is WorkerRole.AGGREGATED else "simulated",
            ),
        )


def read_fleet(file: Path) -> FleetFile:
    """Read a fleet file: JSON if its name ends so, else TOML.

    Raises:
        ConfigError: names the field as `fleet.<dotted name>`.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as problem:
        raise ConfigError("fleet", f"{file} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise ConfigError("fleet", f"{file} is not {'JSON' if file.suffix == '.json' else 'TOML'}: {problem}") from None
    return parse_fleet(values)


def parse_fleet(values: Any) -> FleetFile:
    """Check the fields of a fleet.

    Raises:
        ConfigError: names the field as `fleet.<dotted name>`.
    """
    if not isinstance(values, dict):
        raise ConfigError("fleet", "must be an object with the fields of a fleet")
    try:
        fleet = FleetFile(**values)
        fleet.options()
    except ValidationError as problem:
        raise _refusal(problem.errors(include_url=False)[0]) from None
    except ConfigError as problem:
        message = problem.message.removeprefix(f"{problem.key}: ")
        raise ConfigError(f"fleet.{problem.key}", message) from None
    return fleet


def faster(options: Options, factor: float) -> Options:
    """Options of an engine that computes prompts `factor` times as fast."""
    return replace(
        options,
        prefill_step_s=options.prefill_step_s / factor,
        prefill_tokens_per_s=options.prefill_tokens_per_s * factor,
        prefill_pair_s=options.prefill_pair_s / factor,
    )


def _refusal(error: ErrorDetails) -> ConfigError:
    """The first error, with the section's own fields for the words about ranges."""
    *sections, leaf = (str(part) for part in error["loc"])
    model: type[BaseModel] = FleetFile
    for name in sections:
        inner = model.model_fields[name].annotation
        assert isinstance(inner, type), "a section's type is its model"
        assert issubclass(inner, BaseModel), "a section's type is its model"
        model = inner
    key = ".".join(("fleet", *sections, leaf))
    if error["type"] == "extra_forbidden":
        return ConfigError(key, f"is no field; fields are {', '.join(model.model_fields)}")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return ConfigError(key, "must be a table of fields")
    return ConfigError(key, sentence(model.model_fields, {**error, "loc": (leaf,)}))
