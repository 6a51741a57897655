"""Checks that `tandem up` and `tandem demo` run before they start a process, so that a wrong setting fails at once.

Owns the order of the checks. The ranges are those of the worker's settings and of its engine.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tandem import config as configuration
from tandem.cli.state import DEMO_MODEL
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.limits import PORT_MAX
from tandem.domain.network_address import checked_host, is_any_host, join_address
from tandem.domain.worker import WorkerRole
from tandem.engine.factory import create_engine
from tandem.errors import ConfigError, StartError
from tandem.local_cluster.cluster import ClusterSpec
from tandem.rpc.listening import listen_problem
from tandem.tls.material import read_material
from tandem.tls.paths import Tls
from tandem.worker.config import WorkerConfig

COLLECTOR_TIMEOUT_S = 2.0
COUNTS_MIN = {"prefill": 0, "decode": 0, "aggregated": 0, "frontends": 1, "frontend_processes": 1, "registries": 1}


def named_models(given: Sequence[str], model_name: str | None, embedding: Sequence[str] = ()) -> dict[str, Any]:
    """The models of a `ClusterSpec` from the options --model and --embedding-model, each [NAME=]DIRECTORY, and
    --model-name.

    Raises:
        ConfigError: a model has no name, or two have the same.
    """
    embeds = _by_name("embedding_model", embedding)
    named = _generating(given, model_name)
    taken = {named.get("model_name") or named["model"].resolve().name, *named.get("more_models", ())}
    for name in taken & embeds.keys():
        raise ConfigError("embedding_model", f"must have another name for each model: {name!r} is given twice")
    return {**named, "embedding_models": embeds} if embeds else named


def _generating(given: Sequence[str], model_name: str | None) -> dict[str, Any]:
    if len(given) == 1 and model_name is not None:
        return {"model": Path(given[0]), "model_name": model_name}
    models = _by_name("model", given)
    if model_name is not None:
        raise ConfigError("model_name", "names one model; give several as --model NAME=DIRECTORY")
    (first, path), *more = models.items()
    return {"model": path, "model_name": first, "more_models": dict(more)}


def _by_name(setting: str, given: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for each in given:
        name, has_name, directory = each.rpartition("=")
        if has_name and not (name and directory):
            raise ConfigError(setting, f"must be DIRECTORY or NAME=DIRECTORY, not {each!r}")
        name = name or Path(directory).resolve().name
        if name in models:
            raise ConfigError(setting, f"must have another name for each model: {name!r} is given twice")
        models[name] = Path(directory)
    return models


def check_spec(spec: ClusterSpec) -> None:
    """Reject a cluster that cannot start, or that could not serve any request.

    Raises:
        ConfigError: names the setting.
        StartError: a dependency is not installed, or the model is damaged.
    """
    _check_counts(spec)
    _check_host(spec.host)
    _check_adapters(spec)
    if spec.model == DEMO_MODEL and not spec.model.is_dir():
        raise ConfigError("model", f"must be given: this installation has no demo model ({DEMO_MODEL})")
    config = _check_worker(spec)
    _check_collector(config.otlp_endpoint if spec.otlp_endpoint is not None else None)
    _check_certificates(spec)
    for model in (spec.model, *spec.more_models.values()):
        read_checkpoint(model)
    for model in spec.embedding_models.values():
        read_checkpoint(model).check_embeds()
    _check_ports(spec)
    if spec.edge:
        from tandem.service.envoy_binary import find_binary

        find_binary(None)


def _check_counts(spec: ClusterSpec) -> None:
    for name, least in COUNTS_MIN.items():
        if getattr(spec, name) < least:
            raise ConfigError(name, f"must be at least {least}, not {getattr(spec, name)}")
    if spec.registries > 1 and spec.consul is None:
        raise ConfigError("registries", "more than one registry requires --consul, their shared store")
    if not spec.aggregated and not spec.prefill:
        raise ConfigError("prefill", "needs at least one prefill and one decode worker, or one aggregated worker")
    if bool(spec.prefill) != bool(spec.decode):
        missing = "decode" if spec.prefill else "prefill"
        raise ConfigError(missing, "must be at least 1: prefill and decode workers work only in pairs")


def _check_adapters(spec: ClusterSpec) -> None:
    if spec.more_models and spec.worker_flags.get("adapters"):
        raise ConfigError("adapter", "is of one model: with several, load it by `tandem adapter load --model`")


def _check_host(host: str) -> None:
    try:
        checked_host(host)
    except ValueError as problem:
        raise ConfigError("host", str(problem)) from None
    if is_any_host(host):
        raise ConfigError("host", f"must be one address of this machine, not {host}: the processes also advertise it")
    reason = listen_problem(host, 0)
    if reason is not None:
        raise ConfigError("host", f"{host} is no address of this machine: {reason}")


def _check_worker(spec: ClusterSpec) -> WorkerConfig:
    flags = {
        "registry": join_address(spec.host, 1),
        "model": str(spec.model),
        "engine": spec.engine,
        **spec.worker_flags,
    }
    if spec.model_name is not None:
        flags["model-name"] = spec.model_name
    if spec.otlp_endpoint is not None:
        flags["otlp-endpoint"] = spec.otlp_endpoint
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    config = configuration.load(WorkerConfig, "tandem-worker", arguments, {})
    settings = config.engine_settings(WorkerRole.AGGREGATED if not spec.prefill else WorkerRole.PREFILL)
    create_engine(config.engine, settings)
    if config.engine == "sglang":
        from tandem.engine.sglang import compat

        compat.check_installed(config.transfer_backend)
        if config.device == "cuda" and not _has_nvidia_driver():
            raise ConfigError("device", "cuda is not available: no NVIDIA driver on this machine; use auto or cpu")
    return config


def _check_collector(endpoint: str | None) -> None:
    """Reject a collector that does not listen. A service started alone only logs it: the collector may come later."""
    if endpoint is None:
        return
    url = urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((str(url.hostname), port), COLLECTOR_TIMEOUT_S).close()
    except OSError as problem:
        why = problem.strerror or str(problem)
        raise ConfigError(
            "otlp_endpoint",
            f"no collector listens at {url.hostname}:{port} ({why}): start it first, or omit the option",
        ) from None


def _check_certificates(spec: ClusterSpec) -> None:
    """Reject a directory in which the certificate of a process, or of the client, is missing or unusable."""
    directory = spec.tls
    if directory is None:
        return
    names = {
        "registry": spec.registries,
        "prefill": spec.prefill,
        "decode": spec.decode + spec.aggregated + len(spec.embedding_models),
        "frontend": spec.frontends,
        "edge": spec.edge,
        "consul": spec.consul is not None and spec.consul.address is None,
        "client": True,
    }
    if not directory.is_dir():
        raise ConfigError("tls", f"there is no directory {directory}: create it with `tandem certs {directory}`")
    for name in [name for name, count in names.items() if count]:
        try:
            read_material(Tls.in_directory(directory, name))
        except StartError as problem:
            raise ConfigError("tls", f"{problem}: `tandem certs {directory}` creates and renews the files") from None


def _has_nvidia_driver() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/nvidiactl")
    return True


def _check_ports(spec: ClusterSpec) -> None:
    edge_port = spec.http_port if spec.edge else 0
    ports = {"port": spec.frontend_port, "http_port": edge_port, "console_port": spec.console_port or 0}
    for name, port in ports.items():
        if not 0 <= port <= PORT_MAX:
            raise ConfigError(name, f"must be 0 to {PORT_MAX}, not {port}")
        problem = listen_problem(spec.host, port)
        if problem is not None:
            raise ConfigError(
                name, f"cannot listen on {join_address(spec.host, port)} ({problem}); 0 selects a free port"
            )
    if spec.edge and spec.http_port and spec.http_port == spec.frontend_port:
        raise ConfigError("http_port", "must differ from --port")
