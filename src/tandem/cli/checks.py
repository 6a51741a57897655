"""Checks that `tandem up` and `tandem demo` run before they start a process, so that a wrong setting fails at once.

Owns the order of the checks. The ranges are those of the worker's settings and of its engine.
"""

from __future__ import annotations

import ctypes
import os
import sys

from tandem import config as configuration
from tandem.cli.state import DEMO_MODEL
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.limits import PORT_MAX
from tandem.domain.worker import WorkerRole
from tandem.engine.factory import create_engine
from tandem.errors import ConfigError
from tandem.local_cluster.cluster import ClusterSpec
from tandem.rpc.listening import listen_problem
from tandem.worker.config import WorkerConfig

HOST = "127.0.0.1"
COUNTS_MIN = {"prefill": 0, "decode": 0, "aggregated": 0, "frontends": 1, "frontend_processes": 1, "registries": 1}


def check_spec(spec: ClusterSpec) -> None:
    """Reject a cluster that cannot start, or that could not serve any request.

    Raises:
        ConfigError: names the setting.
        StartError: a dependency is not installed, or the model is damaged.
    """
    _check_counts(spec)
    if spec.model == DEMO_MODEL and not spec.model.is_dir():
        raise ConfigError("model", f"must be given outside a checkout of Tandem (no {DEMO_MODEL} here)")
    _check_worker(spec)
    read_checkpoint(spec.model)
    _check_ports(spec)
    if spec.edge:
        from tandem.service.envoy_binary import find_binary

        find_binary(None)


def _check_counts(spec: ClusterSpec) -> None:
    for name, least in COUNTS_MIN.items():
        if getattr(spec, name) < least:
            raise ConfigError(name, f"must be {least} or more, not {getattr(spec, name)}")
    if spec.registries > 1 and spec.consul is None:
        raise ConfigError("registries", "more than one registry requires --consul, their shared store")
    if not spec.aggregated and not spec.prefill:
        raise ConfigError("prefill", "needs at least one prefill and one decode worker, or one aggregated worker")
    if bool(spec.prefill) != bool(spec.decode):
        missing = "decode" if spec.prefill else "prefill"
        raise ConfigError(missing, "must be 1 or more: prefill and decode workers work only in pairs")


def _check_worker(spec: ClusterSpec) -> None:
    flags = {"registry": f"{HOST}:1", "model": str(spec.model), "engine": spec.engine, **spec.worker_flags}
    if spec.model_name is not None:
        flags["model-name"] = spec.model_name
    arguments = [f"--{key}={value}" for key, value in flags.items()]
    config = configuration.load(WorkerConfig, "tandem-worker", arguments, {})
    settings = config.engine_settings(WorkerRole.AGGREGATED if not spec.prefill else WorkerRole.PREFILL)
    create_engine(config.engine, settings)
    if config.engine == "sglang":
        from tandem.engine.sglang import compat

        compat.check_installed(config.transfer_backend)
        if config.device == "cuda" and not _has_nvidia_driver():
            raise ConfigError("device", "cuda is not available: no NVIDIA driver on this machine; use auto or cpu")


def _has_nvidia_driver() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/nvidiactl")
    return True


def _check_ports(spec: ClusterSpec) -> None:
    ports = {"port": spec.frontend_port, "http_port": spec.http_port if spec.edge else 0}
    for name, port in ports.items():
        if not 0 <= port <= PORT_MAX:
            raise ConfigError(name, f"must be a whole number from 0 to {PORT_MAX}, not {port}")
        problem = listen_problem(HOST, port)
        if problem is not None:
            raise ConfigError(name, f"cannot listen on {HOST}:{port} ({problem}); 0 selects a free port")
    if spec.edge and spec.http_port and spec.http_port == spec.frontend_port:
        raise ConfigError("http_port", "must differ from --port")
