"""Entry points through which SGLang's processes load Tandem (groups sglang.srt.platforms and sglang.srt.plugins).

SGLang calls both in its main process and in every child. They do nothing unless the adapter has set DEVICE_SWITCH.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from tandem.engine.sglang.environment import plugin_device
from tandem.service.parent_death import follow


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """A CPU platform on plain PyTorch, out of tree: SGLang's own CPU platform requires compiled kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """False: there is no device to pin memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """Attention implemented in PyTorch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Selects each layer's native PyTorch implementation."""
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        """Name of the profiler activity; SGLang requires it of out-of-tree platforms."""
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """The same as PyTorch's enum value."""
        import torch

        return torch.profiler.ProfilerActivity.CPU


def activate() -> str | None:
    """Class path of the platform to use: PlainCpuPlatform on a CPU; None to keep SGLang's own choice (CUDA)."""
    return "tandem.engine.sglang.plugin.PlainCpuPlatform" if plugin_device() == "cpu" else None


def register() -> None:
    """Register the hooks of this process."""
    device = plugin_device()
    if device is None:
        return
    from tandem.engine.sglang.hooks import scheduler_hooks

    parent = multiprocessing.parent_process()
    if parent is None:
        scheduler_hooks.register_in_main()
        return
    # SGLang sets PR_SET_PDEATHSIG too, but does not check whether its parent has already died by then.
    assert parent.pid is not None
    if not follow(parent.pid, signal.SIGKILL):
        os._exit(1)
    # A signal to the whole process group (Ctrl-C, systemd) reaches the children too, and must not end them before the
    # parent has drained. The parent kills them when it stops, and PR_SET_PDEATHSIG does when it dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    scheduler_hooks.register_in_child(device)
