"""The package as pip installs it, away from the source tree: it is built once, and its commands are whole.

The libraries are this environment's own, seen through a path file: what is proved here is what the wheel carries.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.client import calls
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tools.build_packages import copy_tree

pytest.importorskip("setuptools", minversion="77")

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("tandem-registry", "tandem-frontend", "tandem-prefill", "tandem-decode", "tandem-edge", "tandem")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of the sdist, as a package index would have both."""
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    run: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "timeout": 200}
    source = folder / "source"
    copy_tree(source)
    sdist = subprocess.run([sys.executable, "-c", build.format(kind="sdist"), str(folder)], cwd=source, **run)
    unpacked = folder / "unpacked"
    with tarfile.open(folder / sdist.stdout.split()[-1]) as archive:
        archive.extractall(unpacked, filter="data")
    [tree] = unpacked.iterdir()
    made = subprocess.run([sys.executable, "-c", build.format(kind="wheel"), str(folder)], cwd=tree, **run)
    return folder / str(made.stdout).split()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment that has the wheel, and Tandem from nowhere else."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    [packages] = (home / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True, timeout=200)
    # Appended behind the environment's own, and a path file within it is not followed: the editable install stays out.
    (packages / "libraries.pth").write_text(site.getsitepackages()[0] + "\n")
    return home / "bin"


def test_the_wheel_carries_what_is_no_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"tandem_edge/envoy/edge.yaml.jinja", "tandem_edge/envoy/errors.lua.jinja", "tandem/py.typed"} <= names
    assert any(name.startswith("tandem/engine/simulated/profiles/") for name in names)
    assert {f"tandem_frontend/console/static/{name}" for name in ("index.html", "console.js", "console.css")} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "tools")]


def test_the_wheel_carries_the_demo_model_and_the_requirements_of_the_cpu_engine(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for file in DEMO_MODEL.iterdir():
            if file.name != "training_log.json":
                assert archive.read(f"tandem/models/tandem-demo/{file.name}") == file.read_bytes(), file.name
        listed = {name for name in archive.namelist() if name.startswith("tandem/requirements/")}
    assert listed == {f"tandem/requirements/{name}.txt" for name in ("torch", "cpu-engine", "cpu-engine-nodeps")}
    # A package index takes 100 MB; this is mostly the model's 8 MB.
    assert wheel.stat().st_size < 12_000_000


def test_the_demo_runs_in_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [str(installed / "tandem"), "demo", "--engine", "simulated"],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "KV moved (simulated)" in ended.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_its_help(installed: Path, tmp_path: Path, command: str) -> None:
    run: dict[str, Any] = {"cwd": tmp_path, "env": clean_environment(), "text": True, "check": True, "timeout": 100}
    shown = subprocess.run([str(installed / command), "--help"], capture_output=True, **run)
    assert "usage" in shown.stdout.lower()
    where = [str(installed / "python"), "-c", "import tandem; print(tandem.__file__)"]
    found = subprocess.run(where, capture_output=True, **run).stdout
    assert found.startswith(str(installed.parent)), found


async def test_a_registry_and_a_frontend_run_of_it(installed: Path, tmp_path: Path) -> None:
    with process(installed, tmp_path, "registry") as registry_file:
        registry = await announced(registry_file)
        flags = (f"--registry={registry}", f"--model={DEMO_MODEL}", "--frontend-id=frontend-0")
        with process(installed, tmp_path, "frontend", *flags) as frontend_file:
            frontend = await announced(frontend_file)
            assert await calls.is_serving(frontend, PROCESS_SERVICE_NAME)

            async def names() -> list[str]:
                return [entry.frontend.frontend_id for entry in (await calls.list_members(registry)).frontends]

            assert await assert_eventually(names, bool, within_s=20, what="the frontend's entry") == ["frontend-0"]


def clean_environment() -> dict[str, str]:
    """Without settings of Tandem, and without paths to another one."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("TANDEM_", "PYTHON"))}


@contextmanager
def process(installed: Path, folder: Path, service: str, *flags: str) -> Iterator[Path]:
    """A service of the environment, in a folder that has nothing of the source tree. It ends in order."""
    announcement = folder / f"{service}.json"
    child = subprocess.Popen(
        [str(installed / f"tandem-{service}"), "--drain-settle-s=0", f"--announce-file={announcement}", *flags],
        cwd=folder,
        env=clean_environment(),
        stderr=subprocess.DEVNULL,
    )
    try:
        yield announcement
    finally:
        child.terminate()
        assert child.wait(60) == 0


async def announced(file: Path) -> str:
    await assert_eventually(file.exists, within_s=60, what=f"{file.name}")
    address: str = json.loads(file.read_text())["address"]
    return address
