"""From `EngineSettings` to SGLang's ServerArgs: the one place that knows which arguments Tandem sets, and why.

Chooses the ports too. Does not read the environment, nor start anything.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.errors import ConfigError, StartError

FIELDS = Path("srt") / "arg_groups" / "fields"
"""Classes with a namespace, each argument an annotated name."""


def read_names() -> frozenset[str]:
    """Names of the arguments; empty where SGLang is not installed, or keeps them elsewhere."""
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
RESERVED_SHARE = 8
RESERVED_TOKENS_MAX = 512
"""SGLang's own default."""
FREE_PORTS = (20_000, 32_000)
"""Below the range from which the kernel takes ports for outgoing connections, so nobody takes one in the meantime."""
FREE_PORT_TRIES = 100
LOG_LEVELS = {"warning": "error"}
"""SGLang warns of every model and every kind of hardware that it does without."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TRANSFER_BACKENDS = ("nixl", "fake")


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of one engine; those of two engines that start at the same moment never meet."""

    server: int
    distributed: int
    bootstrap: int


def check_settings(settings: EngineSettings) -> None:
    """Refuse what no SGLang engine could be started with.

    Raises:
        ConfigError: names the setting.
    """
    for name, value, allowed in (
        ("device", settings.device, DEVICES),
        ("dtype", settings.dtype, DTYPES),
        ("transfer_backend", settings.transfer_backend, TRANSFER_BACKENDS),
    ):
        if value not in allowed:
            raise ConfigError(name, f"must be one of {', '.join(allowed)}, not {value!r}")
    for name, count in (("threads", settings.threads), ("running_requests_max", settings.running_requests_max)):
        if count < 1:
            raise ConfigError(name, f"must be at least 1, not {count}")
    if settings.extra:
        _check_names(settings.extra, read_names())


def choose_ports(settings: EngineSettings) -> Ports:
    """Take the configured bootstrap port, and free ones for the rest.

    Raises:
        StartError: the configured port is in use, or its address is not this machine's.
    """
    bootstrap = settings.bootstrap_port
    if settings.role is not WorkerRole.PREFILL or bootstrap == 0:
        bootstrap = free_port(settings.host)
    elif (problem := _bind_problem(settings.host, bootstrap)) is not None:
        raise StartError(f"bootstrap port {bootstrap} of {settings.host} cannot be used: {problem}")
    return Ports(server=free_port(settings.host), distributed=free_port("127.0.0.1"), bootstrap=bootstrap)


def free_port(host: str) -> int:
    """A port nobody listens on.

    Raises:
        StartError: none could be bound; the sentence says why.
    """
    draw = random.SystemRandom()
    problem = None
    for _ in range(FREE_PORT_TRIES):
        port = draw.randrange(*FREE_PORTS)
        problem = _bind_problem(host, port)
        if problem is None:
            return port
    raise StartError(f"no free port on {host}: {problem}")


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
        "max_running_requests": settings.running_requests_max,
        "random_seed": settings.seed,
        "log_level": LOG_LEVELS.get(settings.log_level.lower(), settings.log_level.lower()),
        # Idle schedulers otherwise spin on one core each.
        "sleep_on_idle": True,
        # The figures `load` reads; SGLang's own default is every 15th step.
        "load_snapshot_publish_interval": 1,
        # Where a schema allows any white space, a model can go on with it until its budget is used up.
        "constrained_json_disable_any_whitespace": True,
    }
    if settings.kv_capacity_tokens is not None or device == "cpu":
        arguments["max_total_tokens"] = settings.kv_capacity_tokens or KV_CAPACITY_TOKENS_CPU
    if device == "cpu":
        arguments |= {
            "attention_backend": "torch_native",
            # With overlap on, the first hit of the prefix cache asks for a CUDA event and kills the scheduler.
            "disable_overlap_schedule": True,
        }
    return arguments | _role_arguments(settings, device, ports) | _extra_arguments(settings)


def _role_arguments(settings: EngineSettings, device: str, ports: Ports) -> dict[str, Any]:
    if settings.role is WorkerRole.AGGREGATED:
        return {}
    arguments: dict[str, Any] = {
        "disaggregation_mode": settings.role.value,
        "disaggregation_transfer_backend": settings.transfer_backend,
        "disaggregation_bootstrap_port": ports.bootstrap,
    }
    if settings.role is WorkerRole.DECODE and device == "cpu":
        arguments["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    if settings.role is WorkerRole.DECODE and settings.kv_capacity_tokens is not None:
        # SGLang takes no prompt unless this much is free besides: on a small pool, never.
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
        "tokenizer_worker_num",
        "detokenizer_worker_num",
        "skip_tokenizer_init",
        "incremental_streaming_output",
        "nnodes",
        "node_rank",
    )
)
"""Settled by EngineSettings, or by what the adapter can read from the engine's answers."""


def _extra_arguments(settings: EngineSettings) -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs

    _check_names(settings.extra, frozenset(ServerArgs.__struct_fields__))
    return settings.extra


def _check_names(extra: dict[str, Any], known: frozenset[str]) -> None:
    """`known` is empty when nobody can say."""
    for name in extra:
        if name in OWNED:
            raise ConfigError(f"engine_extra.{name}", "is settled by a setting of the worker's own")
        if known and name not in known:
            raise ConfigError(f"engine_extra.{name}", "is not an argument of SGLang's ServerArgs")


def _bind_problem(host: str, port: int) -> str | None:
    """Why nobody can listen there; None when one can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as problem:
        return problem.strerror or str(problem)
    return None
