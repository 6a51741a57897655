"""Describes the machine of a run: hardware, drivers and the versions of relevant packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

PACKAGES = (
    *("tandem", "sglang", "sglang-kernel", "flashinfer-python", "torch", "triton", "transformers", "xgrammar"),
    *("nixl", "nixl-cu13", "nixl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "nvidia-cublas", "grpcio", "protobuf"),
)
COMMANDS = {
    "gpus": ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
    "links": ["nvidia-smi", "topo", "-m"],
    "compiler": ["nvcc", "--version"],
}


def facts() -> dict[str, Any]:
    """Everything that a report of a run needs to say of its machine."""
    found: dict[str, Any] = {name: _said(command) for name, command in COMMANDS.items()}
    found["packages"] = {name: _version(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    found["kernel"] = platform.release()
    found["cores"] = os.cpu_count()
    found["infiniband"] = os.path.isdir("/dev/infiniband")
    return found


def gpu_count() -> int:
    """GPUs of this machine that the driver lists; 0 without one."""
    listed = _said(["nvidia-smi", "-L"]) or []
    return sum(line.startswith("GPU ") for line in listed)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(command: list[str]) -> list[str] | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()
