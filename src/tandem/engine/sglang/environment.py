"""The environment variables of an engine's processes: SGLang reads most of its transport settings from nowhere else.

Owns the switch that turns Tandem's plugin on. Nothing of the plugin works unless an adapter has set it in this process
or in its parent, so that having Tandem installed never changes anybody else's SGLang.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path

from tandem.engine.settings import EngineSettings
from tandem.errors import StartError

DEVICE_SWITCH = "TANDEM_SGLANG_DEVICE"
"""Set by the adapter to "cpu" or "cuda"; the plugin does nothing without it."""
REPORT_FILE = "TANDEM_SGLANG_REPORT"
"""Where a child process writes the one sentence that says why it ended."""
PLATFORM_NAME = "tandem_cpu"
"""Name of the entry point in the group sglang.srt.platforms."""
STANDINS = Path(__file__).with_name("standins")

HANDOVER_TIMEOUT_S = 30
HEARTBEAT_INTERVAL_S = 1.0
GRAMMAR_LOOKS_MAX = 1_000


def variables(settings: EngineSettings, device: str, report_file: Path) -> dict[str, str | None]:
    """What must hold for the engine's processes, whatever the operator's environment says; None: unset.

    Raises:
        StartError: the engine's host is a name without an address.
    """
    values: dict[str, str | None] = {
        DEVICE_SWITCH: device,
        REPORT_FILE: str(report_file),
        # NIXL's control sockets would otherwise bind the first address of the first network card.
        "SGLANG_HOST_IP": _ip(settings.host),
        # A list of allowed plugins that lacks ours would silently leave the hooks out.
        "SGLANG_PLUGINS": None,
    }
    if device == "cpu":
        values |= {
            "SGLANG_PLATFORM": PLATFORM_NAME,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(settings.threads),
            "MKL_NUM_THREADS": str(settings.threads),
        }
    return values


def _ip(host: str) -> str:
    """An address of the host, which may be a name (in a container it is): sockets bind to addresses only."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as problem:
        raise StartError(f"advertise_host: {host} has no address: {problem.strerror}") from None


def defaults(device: str) -> dict[str, str]:
    """What holds unless the operator's environment says otherwise."""
    values = {
        # SGLang's own are 300 s, and two missed heartbeats 5 s apart.
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(HANDOVER_TIMEOUT_S),
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(HANDOVER_TIMEOUT_S),
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_INTERVAL_S),
        # Looks of 5 ms at a grammar that is being compiled, so 5 s and more; SGLang's own are 10,000.
        "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS": str(GRAMMAR_LOOKS_MAX),
        # The model is a directory on this machine: nothing here needs to ask a hub.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Its children greet with warnings about hardware they do not need, and with progress bars.
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
        "NIXL_LOG_LEVEL": "WARN",
    }
    if device == "cpu":
        values |= {
            "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS": '{"num_threads": "1"}',
            "SGLANG_DISAGGREGATION_QUEUE_SIZE": "1",
        }
    return values


def apply(settings: EngineSettings, device: str, report_file: Path) -> None:
    """Change this process's environment; its children inherit it. Must come before SGLang is imported."""
    for name, value in defaults(device).items():
        os.environ.setdefault(name, value)
    for name, required in variables(settings, device, report_file).items():
        if required is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = required
    if device == "cpu" and str(STANDINS) not in sys.path:
        # Last, so that a real package always wins. Spawned children get this path from multiprocessing.
        sys.path.append(str(STANDINS))
    warnings.filterwarnings("ignore", module=r"(sglang|triton|torchvision)(\..*)?$")


def plugin_device() -> str | None:
    """The device, in a process of an engine that an adapter started; None anywhere else."""
    return os.environ.get(DEVICE_SWITCH)
