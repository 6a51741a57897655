"""Writes sbom.json, a CycloneDX bill of materials of the project's environment; run by `make sbom`.

The tool runs in an environment of its own under .cache, so that it is not part of what it lists.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".cache" / "sbom"
PINS = ROOT / "requirements" / "sbom.txt"
STAMP = ENVIRONMENT / "pins.txt"
LISTED = ROOT / ".venv" / "bin" / "python"
OUTPUT = ROOT / "sbom.json"


def main() -> int:
    if not (STAMP.is_file() and STAMP.read_text() == PINS.read_text()):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(PINS)], check=True)
        STAMP.write_text(PINS.read_text())
    command = [str(ENVIRONMENT / "bin" / "cyclonedx-py"), "environment", "--output-reproducible"]
    subprocess.run(
        [*command, "--pyproject", str(ROOT / "pyproject.toml"), "--output-file", str(OUTPUT), str(LISTED)], check=True
    )
    print(f"{OUTPUT.name} lists what {LISTED.parents[1].name} has installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
