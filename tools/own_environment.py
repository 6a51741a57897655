"""Environments below .cache for tools that must not be in the project's own: another version, or too much of it.

Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]


def own_environment(name: str, *, borrows: bool = False) -> Path:
    """The `bin` of the environment with what requirements/NAME.txt pins; made again only if the pins have changed.

    What NAME-nodeps.txt pins is installed without what it asks for. Either file may be missing.

    Args:
        name: of the files, and of the folder below .cache.
        borrows: whether packages that are not in this environment are found in the project's own, behind all others.

    Raises:
        CalledProcessError: a package cannot be installed.
    """
    environment, pins = ROOT / ".cache" / name, ROOT / "requirements" / f"{name}.txt"
    alone = pins.with_name(f"{name}-nodeps.txt")
    wanted = "".join(file.read_text() for file in (pins, alone) if file.is_file())
    stamp = environment / "pins.txt"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if pins.is_file():
            subprocess.run([*pip, "-r", str(pins)], check=True)
        if alone.is_file():
            subprocess.run([*pip, "--no-deps", "-r", str(alone)], check=True)
        if borrows:
            [packages] = environment.glob("lib/python*/site-packages")
            (packages / "zz-borrowed.pth").write_text(f"{Path(sysconfig.get_path('purelib')).resolve()}\n")
        stamp.write_text(wanted)
    return environment / "bin"


def own_node_modules(name: str) -> Path:
    """The folder with the npm packages that requirements/NAME.package.json pins; made again only if it has changed.

    Raises:
        CalledProcessError: a package cannot be installed.
    """
    folder, pins = ROOT / ".cache" / f"{name}-npm", ROOT / "requirements" / f"{name}.package.json"
    stamp = folder / "installed.json"
    if not (stamp.is_file() and stamp.read_text() == pins.read_text()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(pins, folder / "package.json")
        npm = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(npm, cwd=folder, check=True)
        shutil.copy(pins, stamp)
    return folder
