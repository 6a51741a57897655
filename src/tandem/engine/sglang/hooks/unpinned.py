"""Lets SGLang's LoRA code run without a GPU: it asks for pinned host memory, which PyTorch has only beside a device.

Registered on a CPU only. Changes the two modules that allocate pinned memory, in the scheduler's process, when it makes
its LoRA manager; without adapters nothing is changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

MODULES = ("sglang.srt.lora.backend.torch_backend", "sglang.srt.lora.layers")
ALLOCATIONS = ("arange", "empty", "full", "ones", "tensor", "zeros")


class UnpinnedTorch:
    """PyTorch, with allocations that ignore `pin_memory`."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._torch, name)
        return _unpinned(found) if name in ALLOCATIONS else found


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler."""
    return {"sglang.srt.lora.lora_manager.LoRAManager.__init__": (_use_plain_memory, "before")}


def _use_plain_memory(*arguments: Any, **keywords: Any) -> None:
    import torch

    for name in MODULES:
        module: Any = importlib.import_module(name)
        module.torch = UnpinnedTorch(torch)
    torch.Tensor.pin_memory = _itself


def _itself(tensor: Any, *arguments: Any) -> Any:
    return tensor


def _unpinned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def allocated(*arguments: Any, pin_memory: bool = False, **keywords: Any) -> Any:
        return allocate(*arguments, **keywords)

    return allocated
