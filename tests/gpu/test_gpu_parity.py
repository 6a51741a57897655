"""The proof on GPUs: a pair's greedy tokens are an aggregated worker's, because its KV moved over NIXL.

Opt-in by having a GPU and SGLang's packages for it (docs/evidence/gpu.md). The same driver that measures runs here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO_MODEL = Path(__file__).parents[2] / "models" / "tandem-demo"
FIRST_START_S = 540
"""SGLang compiles kernels the first time; that took 221 s."""

pytestmark = [
    pytest.mark.engine_cuda,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("sgl_kernel") is None, reason="needs SGLang's packages for CUDA"),
    pytest.mark.timeout(FIRST_START_S + 60),
]


def test_a_pair_answers_as_one_worker_and_its_kv_moved(tmp_path: Path) -> None:
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout.count("GPU ")
    subprocess.run(
        [
            *(sys.executable, "-m", "tools.gpu", "run", "--steps", "parity", "--model", str(DEMO_MODEL)),
            *("--out", str(tmp_path), "--gpus", str(min(gpus, 2)), "--deadline-s", str(FIRST_START_S)),
        ],
        check=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    alone = results["parity_1"]
    assert alone["failures"] == []
    assert alone["equal"] == alone["prompts"] == alone["kv_bytes_exact"]
    assert alone["recomputed_tokens"] == 0
