"""Entry points through which SGLang's own processes find Tandem (groups sglang.srt.platforms and sglang.srt.plugins).

SGLang calls both in its main process and in every child. They do nothing unless an adapter has switched them on.
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
    """Out of tree for SGLang: its own CPU platform wants compiled kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device to pin memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """Attention in PyTorch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """Every layer's plain implementation."""
        return "native"

    def get_torch_profiler_activity_str(self) -> str:
        """What SGLang calls this platform's part of a profile; asked of every platform out of tree."""
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        """The same in PyTorch's words."""
        import torch

        return torch.profiler.ProfilerActivity.CPU


def activate() -> str | None:
    """The platform to use: plain PyTorch on a CPU, or None to leave SGLang's own choice (CUDA) alone."""
    return "tandem.engine.sglang.plugin.PlainCpuPlatform" if plugin_device() == "cpu" else None


def register() -> None:
    """Register the hooks of this process."""
    device = plugin_device()
    if device is None:
        return
    from tandem.engine.sglang.hooks import registry

    parent = multiprocessing.parent_process()
    if parent is None:
        registry.register_in_main()
        return
    # SGLang asks for the same, but does not look whether its parent has died by then.
    assert parent.pid is not None
    if not follow(parent.pid, signal.SIGKILL):
        os._exit(1)
    # A signal to the whole group (Ctrl-C, systemd) reaches the children too, and must not end them before their parent
    # has drained. They end when the parent says so, and by PR_SET_PDEATHSIG when it dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    registry.register_in_child(device)
