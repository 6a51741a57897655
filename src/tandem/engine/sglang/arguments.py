"""Converts `EngineSettings` to SGLang's ServerArgs: the only module that knows which arguments Tandem sets, and why.

Also chooses the ports. Does not read the environment and starts nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.domain.network_address import join_address
from tandem.domain.worker import EMBED, WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.errors import ConfigError, StartError

FIELDS = Path("srt") / "arg_groups" / "fields"
"""Directory, inside the sglang package, of the classes whose annotated names are the arguments."""


def read_names() -> frozenset[str]:
    """Names of SGLang's arguments, read without importing it; empty if not installed or defined elsewhere."""
    package = importlib.util.find_spec("sglang")
    names: set[str] = set()
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for file in (Path(folder) / FIELDS).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    names |= _annotated(node)
    return frozenset(names)


def _annotated(node: ast.ClassDef) -> set[str]:
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


KV_CAPACITY_TOKENS_CPU = 16_384
RUNNING_REQUESTS_MAX_CPU = 16
RUNNING_REQUESTS_MAX_GPU = 256
"""What was measured. Frontends also count KV memory, so that long prompts are fewer at a time."""
KV_TOKENS_PER_REQUEST = 512
"""A pool of few tokens runs fewer requests on a GPU: more of them would be retracted again and again."""
RESERVED_SHARE = 8
RESERVED_TOKENS_MAX = 512
"""SGLang's own default."""
FREE_PORTS = (20_000, 32_000)
"""Below the kernel's ephemeral port range, so that no outgoing connection takes the port before SGLang binds it."""
FREE_PORT_TRIES = 100
LOG_LEVELS = {"warning": "error"}
"""Our level -> SGLang's. SGLang warns about every optional model and accelerator that is missing."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRANSFER_BACKENDS = ("nixl", "fake")


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of one engine, drawn at random so that engines that start at the same moment do not collide."""

    server: int
    distributed: int
    bootstrap: int


def check_settings(settings: EngineSettings) -> None:
    """Reject settings that no SGLang engine can start with.

    Raises:
        ConfigError: a value is not allowed; names the setting.
    """
    for name, value, allowed in (
        ("device", settings.device, DEVICES),
        ("dtype", settings.dtype, DTYPES),
        ("transfer_backend", settings.transfer_backend, TRANSFER_BACKENDS),
    ):
        if value not in allowed:
            raise ConfigError(name, f"must be one of {', '.join(allowed)}, not {value!r}")
    if settings.transfer_backend == "fake" and settings.role is WorkerRole.PREFILL:
        raise ConfigError("transfer_backend", "must not be fake on a prefill engine: SGLang starts none with it")
    for name, count in (("threads", settings.threads), ("running_requests_max", settings.running_requests_max)):
        if count is not None and count < 1:
            raise ConfigError(name, f"must be at least 1, not {count}")
    if settings.extra:
        _check_names(settings.extra, read_names())


def choose_ports(settings: EngineSettings) -> Ports:
    """Use the configured bootstrap port, and free ports for the rest.

    Raises:
        StartError: the configured port is in use, or the host is not an address of this machine.
    """
    bootstrap = settings.bootstrap_port
    if settings.role is not WorkerRole.PREFILL or bootstrap == 0:
        bootstrap = free_port(settings.host)
    elif (problem := _bind_problem(settings.host, bootstrap)) is not None:
        raise StartError(f"bootstrap_port: cannot bind {join_address(settings.host, bootstrap)}: {problem}")
    return Ports(server=free_port(settings.host), distributed=free_port("127.0.0.1"), bootstrap=bootstrap)


def free_port(host: str) -> int:
    """A free port on `host`, from FREE_PORTS.

    Raises:
        StartError: none of FREE_PORT_TRIES ports could be bound.
    """
    draw = random.SystemRandom()
    problem = None
    for _ in range(FREE_PORT_TRIES):
        port = draw.randrange(*FREE_PORTS)
        problem = _bind_problem(host, port)
        if problem is None:
            return port
    raise StartError(f"no free port on {host} after {FREE_PORT_TRIES} tries: {problem}")


def server_arguments(settings: EngineSettings, device: str, ports: Ports) -> dict[str, Any]:
    """Keyword arguments of SGLang's ServerArgs."""
    arguments: dict[str, Any] = {
        "model_path": str(settings.model_path),
        "served_model_name": settings.model_name,
        "device": device,
        "dtype": settings.dtype,
        "host": settings.host,
        "port": ports.server,
        "nccl_port": ports.distributed,
        "max_running_requests": running_requests_max(settings, device),
        "random_seed": settings.seed,
        "log_level": LOG_LEVELS.get(settings.log_level.lower(), settings.log_level.lower()),
        # An idle scheduler would otherwise busy-loop on one core.
        "sleep_on_idle": True,
        # `load` reads this snapshot; by default SGLang publishes it only every 15th step.
        "load_snapshot_publish_interval": 1,
        # Where a schema allows any white space, a model can emit it until its token budget is used up.
        "constrained_json_disable_any_whitespace": True,
    }
    if settings.kv_capacity_tokens is not None or device == "cpu":
        arguments["max_total_tokens"] = settings.kv_capacity_tokens or KV_CAPACITY_TOKENS_CPU
    if device == "cpu":
        arguments |= {
            "attention_backend": "torch_native",
            # With overlap on, the first prefix-cache hit creates a CUDA event, which crashes the scheduler on a CPU.
            "disable_overlap_schedule": True,
        }
    if settings.task == EMBED:
        arguments |= EMBEDDING_ARGUMENTS
    arguments |= _role_arguments(settings, device, ports) | _adapter_arguments(settings, device)
    return arguments | _extra_arguments(settings)


def _adapter_arguments(settings: EngineSettings, device: str) -> dict[str, Any]:
    """Adapters are loaded after the start, under names of ours, so SGLang gets ranks and layers here."""
    adapters = settings.adapters
    if adapters is None:
        return {}
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": adapters.rank_max,
        "lora_target_modules": list(adapters.modules),
        # The model alone takes a place in a batch too.
        "max_loras_per_batch": adapters.per_batch_max + 1,
    }
    # The other backends are Triton kernels.
    return arguments | {"lora_backend": "torch_native"} if device == "cpu" else arguments


def running_requests_max(settings: EngineSettings, device: str) -> int:
    """Requests that run at the same time."""
    if settings.running_requests_max is not None:
        return settings.running_requests_max
    if device == "cpu":
        return RUNNING_REQUESTS_MAX_CPU
    if settings.kv_capacity_tokens is None:
        return RUNNING_REQUESTS_MAX_GPU
    fitting = settings.kv_capacity_tokens // KV_TOKENS_PER_REQUEST
    return min(RUNNING_REQUESTS_MAX_GPU, max(RUNNING_REQUESTS_MAX_CPU, fitting))


EMBEDDING_ARGUMENTS: dict[str, Any] = {
    "is_embedding": True,
    # SGLang keeps no salt of an embedding, so that tenants would share the cache.
    "disable_radix_cache": True,
}


def _role_arguments(settings: EngineSettings, device: str, ports: Ports) -> dict[str, Any]:
    if settings.role is WorkerRole.AGGREGATED:
        return {}
    arguments: dict[str, Any] = {
        "disaggregation_mode": settings.role.value,
        "disaggregation_transfer_backend": settings.transfer_backend,
        "disaggregation_bootstrap_port": ports.bootstrap,
        # Also where nothing is checked: metadata buffers pair up by their position, so both sides should have them all.
        "disaggregation_enable_kv_checksum": settings.transfer_backend == "nixl",
    }
    return arguments | decode_arguments(settings, device) if settings.role is WorkerRole.DECODE else arguments


def decode_arguments(settings: EngineSettings, device: str) -> dict[str, Any]:
    """Arguments that matter in the decode role only."""
    arguments: dict[str, Any] = {}
    if device == "cpu":
        arguments["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    if settings.kv_capacity_tokens is not None:
        # SGLang admits a prompt only if this much stays free; its default would never be free on a small pool.
        share_tokens = settings.kv_capacity_tokens // RESERVED_SHARE
        arguments["num_reserved_decode_tokens"] = min(RESERVED_TOKENS_MAX, share_tokens)
    return arguments


OWNED = frozenset(
    (
        "model_path",
        "served_model_name",
        "device",
        "dtype",
        "host",
        "port",
        "nccl_port",
        "max_running_requests",
        "max_total_tokens",
        "random_seed",
        "log_level",
        "disaggregation_mode",
        "disaggregation_transfer_backend",
        "disaggregation_bootstrap_port",
        "disaggregation_enable_kv_checksum",
        "tokenizer_worker_num",
        "detokenizer_worker_num",
        "skip_tokenizer_init",
        "kv_events_config",
        "enable_pd_role_switch",
        "is_embedding",
        "incremental_streaming_output",
        "enable_lora",
        "lora_paths",
        "max_lora_rank",
        "lora_target_modules",
        "max_loras_per_batch",
        "max_loaded_loras",
        "nnodes",
        "node_rank",
    )
)
"""Arguments that `engine_extra` may not set: EngineSettings sets them, or the adapter depends on their value."""


def _extra_arguments(settings: EngineSettings) -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs

    _check_names(settings.extra, frozenset(ServerArgs.__struct_fields__))
    return settings.extra


def _check_names(extra: dict[str, Any], known: frozenset[str]) -> None:
    """Reject owned and unknown argument names. `known` is empty when SGLang's names could not be read."""
    for name in extra:
        if name in OWNED:
            raise ConfigError(f"engine_extra.{name}", "is set by the worker and cannot be overridden")
        if known and name not in known:
            raise ConfigError(f"engine_extra.{name}", "is not an argument of SGLang's ServerArgs")


def _bind_problem(host: str, port: int) -> str | None:
    """Why the port cannot be bound; None if it can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as problem:
        return problem.strerror or str(problem)
    return None
