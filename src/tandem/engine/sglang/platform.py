"""SGLang's platform for a CPU without its AMX kernel package: plain PyTorch, no graphs, no pinned memory.

Named by `plugin.activate`; imported by SGLang alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


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
