"""The environment variables of an engine's processes: most of SGLang's transport settings can only be set there.

Owns the switch that enables Tandem's plugin. The plugin does nothing unless the adapter has set it in this process or
its parent, so that installing Tandem never changes an SGLang that runs without it.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import os
import secrets
import socket
import sys
import warnings
from pathlib import Path

from tandem.engine.settings import EngineSettings
from tandem.engine.sglang.network_devices import check_devices
from tandem.errors import StartError

DEVICE_SWITCH = "TANDEM_SGLANG_DEVICE"
"""Set by the adapter to "cpu" or "cuda"; the plugin does nothing without it."""
REPORT_FILE = "TANDEM_SGLANG_REPORT"
"""Path of the file to which a failing child process writes its reason, one sentence."""
REGISTRATION_KEY = "TANDEM_SGLANG_REGISTRATION_KEY"
"""The secret that an engine's processes add to a registration at its bootstrap server; drawn by each worker."""
PREFIX_CACHE = "TANDEM_SGLANG_PREFIX_CACHE"
"""Whether the engine has a prefix cache in the prefill role: "1" or "0"."""
KV_CHECK_SHARE = "TANDEM_SGLANG_KV_CHECK_SHARE"
"""The share of hand-overs whose KV is compared, 0 to 1."""
PLATFORM_NAME = "tandem_cpu"
"""Name of the entry point in the group sglang.srt.platforms."""
STANDINS = Path(__file__).with_name("standins")

LOOPBACK = "lo"
DECODE_WAIT_TIMEOUT_S = 3_600
"""How long a prefill leg waits until decode has memory for it. A decode engine that is full of long answers is no
failure: the frontend aborts the leg when decode's leg fails or its client's deadline passes."""
HEARTBEAT_INTERVAL_S = 1.0
GRAMMAR_POLLS_MAX = 1_000


def variables(settings: EngineSettings, device: str, report_file: Path) -> dict[str, str | None]:
    """Variables that override the operator's environment; None: unset.

    Raises:
        StartError: the engine's host name does not resolve, or a network device is not there.
    """
    check_devices(settings.ucx.get("UCX_NET_DEVICES"))
    values: dict[str, str | None] = {
        DEVICE_SWITCH: device,
        REPORT_FILE: str(report_file),
        REGISTRATION_KEY: _registration_key(),
        KV_CHECK_SHARE: str(settings.kv_check_share),
        PREFIX_CACHE: "0" if settings.extra.get("disable_radix_cache") else "1",
        # NIXL's control sockets would otherwise bind the first address of the first network interface.
        "SGLANG_HOST_IP": _ip(settings.host),
        **settings.ucx,
        # An allow-list without Tandem's plugin would silently disable the hooks.
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


@functools.cache
def _registration_key() -> str:
    """One for the process: several engines that start in it at a time share its environment."""
    return secrets.token_hex(16)


def _ip(host: str) -> str:
    """Resolve the host, which may be a name (in a container it is): NIXL binds to IP addresses only."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as problem:
        raise StartError(f"advertise_host: {host} does not resolve to an address: {problem.strerror}") from None


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(_ip(host)).is_loopback


def defaults(settings: EngineSettings, device: str) -> dict[str, str]:
    """Defaults for variables that the operator's environment does not set."""
    values = {
        # SGLang waits 300 s for both. Prefill waits for a full decode engine; decode waits for prefill's queue, which
        # frontends keep short, and so ends a hand-over whose messages were lost.
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(DECODE_WAIT_TIMEOUT_S),
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(math.ceil(settings.handover_timeout_s)),
        # Two missed heartbeats end the legs of a dead peer; SGLang sends one every 5 s.
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_INTERVAL_S),
        # SGLang polls a compiling grammar every 5 ms, so this times out after 5 s; its default, 10,000, after 50 s.
        "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS": str(GRAMMAR_POLLS_MAX),
        # The model is a local directory: no download is ever needed.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # SGLang's children print warnings about hardware they do not use, and progress bars.
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
        "NIXL_LOG_LEVEL": "WARN",
    }
    if LOOPBACK in (name for _, name in socket.if_nameindex()):
        # Gloo connects the ranks of this engine, which are all on this machine.
        values["GLOO_SOCKET_IFNAME"] = LOOPBACK
        if _is_loopback(settings.host):
            # So are all peers: UCX and NCCL would also listen on the machine's other addresses. Beyond loopback they
            # choose, because a list of network devices would leave out those of RDMA.
            values |= {"UCX_NET_DEVICES": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}
    if device == "cpu":
        values |= {
            "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS": '{"num_threads": "1"}',
            "SGLANG_DISAGGREGATION_QUEUE_SIZE": "1",
        }
        if (ranks := _ranks(settings)) > 1:
            # SGLang starts more ranks than there are NUMA nodes only with a list of CPUs for each. Plain PyTorch, which
            # the plugin uses, binds none of them.
            values["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))
    return values


def _ranks(settings: EngineSettings) -> int:
    """Scheduler processes of the engine. SGLang refuses sizes that are no numbers, and names them."""
    sizes = [settings.extra.get(name, 1) for name in ("tp_size", "dp_size", "pp_size")]
    return math.prod(size for size in sizes if isinstance(size, int))


def apply(settings: EngineSettings, device: str, report_file: Path) -> None:
    """Change this process's environment, which its children inherit. Must run before SGLang is imported."""
    for name, value in defaults(settings, device).items():
        os.environ.setdefault(name, value)
    for name, required in variables(settings, device, report_file).items():
        if required is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = required
    if device == "cpu" and str(STANDINS) not in sys.path:
        # Appended last, so that an installed package takes precedence. multiprocessing passes sys.path to children.
        sys.path.append(str(STANDINS))
    warnings.filterwarnings("ignore", module=r"(sglang|triton|torchvision)(\..*)?$")


def plugin_device() -> str | None:
    """The device, in a process that belongs to an engine started by the adapter; None in any other process."""
    return os.environ.get(DEVICE_SWITCH)


def resolve_device(wanted: str) -> str:
    """Resolve "auto", "cpu" or "cuda" to "cpu" or "cuda"; imports torch only if a GPU may be used.

    Raises:
        StartError: `wanted` is cuda and PyTorch finds no usable GPU.
    """
    if wanted == "cpu":
        return wanted
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise StartError("device: is cuda, but PyTorch finds no usable GPU: check its driver, or use cpu")
    return "cuda" if has_gpu else "cpu"
