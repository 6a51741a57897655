"""Creates .venv with PyTorch, the CPU engine, the services and the development tools, at their pinned versions.

Standard library only, because it runs before anything is installed. Does nothing if no input has changed since the last
run. The complete log is in .cache/setup.log. Versions are those of requirements/constraints.txt, which
tools/gen_constraints.py writes.

PyTorch is installed first, by itself. If pip finds a CPU build of the pinned version, that is installed; otherwise pip
installs the default build with its CUDA libraries, unless TORCH_INDEX_URL names an index that has a CPU build.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
CACHE = ROOT / ".cache"
LOG = CACHE / "setup.log"
STAMP = ENVIRONMENT / "tandem-setup.stamp"
REQUIREMENTS = ROOT / "requirements"
TORCH = "torch.txt"
LISTED = ("base.txt", "edge.txt", "cpu-engine.txt", "dev.txt", "clients.txt", "replay.txt")
WITHOUT_DEPENDENCIES = ("cpu-engine-nodeps.txt", "clients-nodeps.txt")
CONSTRAINTS = ("-c", REQUIREMENTS / "constraints.txt")
"""Versions of everything, also of what no file lists, so that two set-ups are equal."""
OLDEST_PYTHON = (3, 11)
FORMER_NAME = "tandem"
"""Of this distribution. Two of them in one environment would register the same entry points twice."""
SHOWN_LINES = 15


def main() -> int:
    if sys.version_info[:2] < OLDEST_PYTHON:
        return fail(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
    wanted = fingerprint()
    if STAMP.is_file() and STAMP.read_text() == wanted and PYTHON.exists():
        return 0
    CACHE.mkdir(exist_ok=True)
    LOG.write_text("")
    print(f"setting up {ENVIRONMENT.name} (a few minutes the first time; log: {LOG.relative_to(ROOT)})", flush=True)
    STAMP.unlink(missing_ok=True)
    try:
        if not PYTHON.exists():
            step("environment", [sys.executable, "-m", "venv", str(ENVIRONMENT)])
        step("PyTorch", pip("-r", REQUIREMENTS / TORCH, *torch_source()))
        step("libraries", pip(*CONSTRAINTS, *(part for name in LISTED for part in ("-r", REQUIREMENTS / name))))
        alone = (part for name in WITHOUT_DEPENDENCIES for part in ("-r", REQUIREMENTS / name))
        step("SGLang and NIXL", pip(*CONSTRAINTS, "--no-deps", *alone))
        step("removing the package's earlier name", [str(PYTHON), "-m", "pip", "uninstall", "--yes", FORMER_NAME])
        step("Tandem", pip("--no-deps", "-e", ROOT))
    except subprocess.CalledProcessError as problem:
        last = "\n".join(LOG.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        return fail(f"a step of the set-up failed (status {problem.returncode}); the end of {LOG}:\n{last}")
    STAMP.write_text(wanted)
    return 0


def fail(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def fingerprint() -> str:
    """Hash of everything that determines what is installed."""
    digest = hashlib.sha256(f"{ROOT} {sys.version} {os.environ.get('TORCH_INDEX_URL')}".encode())
    for file in (*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pip(*arguments: str | Path) -> list[str]:
    return [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *map(str, arguments)]


def torch_source() -> list[str]:
    """pip's arguments for the index to install PyTorch from."""
    index = os.environ.get("TORCH_INDEX_URL")
    if index:
        return ["--index-url", index]
    report = CACHE / "torch-report.json"
    step(
        "looking for PyTorch",
        pip("--dry-run", "--no-deps", "--ignore-installed", "--report", report, "-r", REQUIREMENTS / TORCH),
    )
    found = json.loads(report.read_text())["install"][0]["metadata"]
    if any(need.startswith(("nvidia-", "cuda-")) for need in found.get("requires_dist", [])):
        print(
            "  pip gives the default build of PyTorch here, which brings gigabytes of CUDA libraries along.\n"
            "  They are not used on a CPU. To do without, set TORCH_INDEX_URL to PyTorch's index of CPU builds.",
            flush=True,
        )
    return []


def step(name: str, command: list[str]) -> None:
    """Run a command with its output in the log, and show its progress."""
    begin_s = time.monotonic()
    done = threading.Event()
    shown = threading.Thread(target=show, args=(name, begin_s, done))
    shown.start()
    try:
        with LOG.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            subprocess.run(command, stdout=log, stderr=log, check=True, cwd=ROOT)
    finally:
        done.set()
        shown.join()
    print(f"  {name:<22}{time.monotonic() - begin_s:6.1f} s", flush=True)


def show(name: str, begin_s: float, done: threading.Event) -> None:
    """Count seconds on a terminal; otherwise print only the start."""
    if not sys.stdout.isatty():
        print(f"  {name} ...", flush=True)
        return
    while not done.wait(0.5):
        print(f"  {name:<22}{time.monotonic() - begin_s:6.1f} s", end="\r", flush=True)


if __name__ == "__main__":
    sys.exit(main())
