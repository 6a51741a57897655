"""Downloads the packages that a GPU machine lacks, strips them to one GPU architecture, and packs them into pieces.

Runs where package registries can be reached; needs pip, strip and readelf, and 15 GB of disk. Nothing is installed into
the environment it runs in.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools.gpu import pieces, thin

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
FILES = ("base.txt", "cpu-engine.txt", "cpu-engine-nodeps.txt", "gpu-machine.txt")
LEFT_OUT = re.compile(r"nixl-cu12\b|torch==2\.13")
PYTHON_VERSION = "3.12"
PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in ("2014", *(f"_2_{minor}" for minor in range(17, 40))))
UNUSED = (
    *("triton/backends/nvidia/lib/cupti*", "triton/backends/nvidia/bin/ptxas-blackwell", "triton/_C/libproton.so"),
    *("triton/backends/nvidia/bin/nvdisasm", "triton/backends/nvidia/bin/cuobjdump", "triton/instrumentation"),
    *("torch/include", "torch/test", "torch/share", "torch/lib/*.a", "nixl_ep*", "nixl_cu13.scripts", "triton_kernels"),
    *("nixl_cu13.libs/nixl/libplugin_[A-TV-Z]*", ".nixl_cu13.mesonpy.libs/plugins/libplugin_[A-TV-Z]*"),
    *("sgl_kernel/sm100", "sgl_kernel/infllm_ops*", "sgl_kernel/flashmla_ops*", "sglang/multimodal_gen", "sglang/test"),
    *("flashinfer/data/csrc/fused_moe", "flashinfer/data/csrc/nv_internal", "jedi/third_party", "hf_xet/*.so"),
    *("include", "bin", "*/tests", "**/__pycache__"),
)
"""Never imported nor compiled by a Llama on a Hopper GPU; found by leaving them out."""
CODE_FOR_GPUS = (
    *("torch/lib/libtorch_cuda.so", "torch/lib/libtorch_cuda_linalg.so", "torchvision/_C_stable.so"),
    *("nvidia/nccl/lib/libnccl.so.2", "sgl_kernel/sm90/common_ops.abi3.so"),
)
ATTENTION = "sgl_kernel/flash_ops.abi3.so"
WITH_SYMBOLS = ("triton/_C/libtriton.so", "nvidia/nccl/lib/libnccl.so.2")
"""Libraries whose debugging symbols are most of their size."""


def build(work: Path, architecture: int, limit_bytes: int) -> list[Path]:
    """Fetch, thin and pack below `work`. Returns the pieces."""
    site = work / "site"
    install(site)
    lessen(site, architecture)
    return pieces.pack(site, work / "pieces", limit_bytes)


def requirements() -> list[str]:
    """Exact versions of every package, each once."""
    lines = [line.strip() for name in FILES for line in (REQUIREMENTS / name).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#") and not LEFT_OUT.match(line)]
    return sorted(set(wanted))


def install(site: Path) -> None:
    """Install the packages for the machine's Python into a folder, without their dependencies."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON_VERSION, *platforms),
            *requirements(),
        ],
        check=True,
    )


def lessen(site: Path, architecture: int) -> None:
    """Remove files that the machine never uses."""
    removed_bytes = pieces.remove(site, UNUSED)
    for name in CODE_FOR_GPUS:
        removed_bytes += thin.thin_file(site / name, architecture)
    removed_bytes += thin.thin_file(site / ATTENTION, architecture, thin.attention_wanted)
    for name in WITH_SYMBOLS:
        subprocess.run(["strip", "--strip-unneeded", str(site / name)], check=True)
    print(f"{removed_bytes / 1e6:.0f} MB of unused files removed")
