"""Every contract test runs on every adapter; which one is the session-scoped `fleet` fixture's parameter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.testing.fake_model import write_fake_model
from tests.contract.support.fleet import Fleet

REPOSITORY = Path(__file__).parents[2]
TINY_MODEL = REPOSITORY / ".cache" / "models" / "tiny-random-float32"
EXTRA = {"simulated": {"decode_step_s": 0.002, "bootstrap_timeout_s": 20}, "sglang": {}}


@pytest.fixture(scope="session", params=["simulated", pytest.param("sglang", marks=pytest.mark.engine_sglang)])
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    # Only a developer's machine may lack the real engine; in CI its absence would hide everything below.
    if name == "sglang" and importlib.util.find_spec("sglang") is None and not os.environ.get("CI"):
        pytest.skip("sglang is not installed here (requirements/cpu-engine.txt)")
    return name


@pytest.fixture(scope="session")
def model_path(engine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if engine_name == "simulated":
        return write_fake_model(tmp_path_factory.mktemp("model"))
    if not (TINY_MODEL / "model.safetensors").is_file():
        tool = REPOSITORY / "tools" / "make_tiny_model.py"
        subprocess.run([sys.executable, tool, TINY_MODEL, "--seed", "0", "--dtype", "float32"], check=True)
    return TINY_MODEL


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def fleet(engine_name: str, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    log = tmp_path_factory.mktemp(f"{engine_name}-logs") / "engines.log"
    fleet = Fleet(engine_name, model_path, log, EXTRA[engine_name])
    yield fleet
    await fleet.close()
    print(f"engine log: {log}")
