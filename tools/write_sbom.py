"""Writes sbom.json, a CycloneDX bill of materials of the project's environment; run by `make sbom`.

The tool runs in an environment of its own under .cache, so that it is not part of what it lists.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.own_environment import ROOT, own_environment

LISTED = ROOT / ".venv" / "bin" / "python"
OUTPUT = ROOT / "sbom.json"


def main() -> int:
    command = [str(own_environment("sbom") / "cyclonedx-py"), "environment", "--output-reproducible"]
    subprocess.run(
        [*command, "--pyproject", str(ROOT / "pyproject.toml"), "--output-file", str(OUTPUT), str(LISTED)], check=True
    )
    print(f"{OUTPUT.name} lists what {LISTED.parents[1].name} has installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
