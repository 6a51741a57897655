"""Environments below .cache for tools that must not be in the project's own: another version, or too much of it.

Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def own_environment(name: str) -> Path:
    """The `bin` of the environment with what requirements/NAME.txt pins; made again only if the pins have changed.

    What NAME-nodeps.txt pins is installed without what it asks for.
    """
    environment, pins = ROOT / ".cache" / name, ROOT / "requirements" / f"{name}.txt"
    alone = pins.with_name(f"{name}-nodeps.txt")
    wanted = "".join(file.read_text() for file in (pins, alone) if file.is_file())
    stamp = environment / "pins.txt"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(pins)], check=True)
        if alone.is_file():
            subprocess.run([*pip, "--no-deps", "-r", str(alone)], check=True)
        stamp.write_text(wanted)
    return environment / "bin"
