"""Prints where Prometheus's binaries are; fetches Debian's into .cache when none are on PATH. Standard library only.

PATH="$(dirname "$(python tools/prometheus_binary.py)"):$PATH"
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from tandem.errors import StartError
from tandem.local_cluster.debian import DebianProgram, find_program

PROMETHEUS, PROMTOOL = (
    DebianProgram(name=name, title=name, package="prometheus", suite="bookworm") for name in ("prometheus", "promtool")
)


def main() -> int:
    try:
        print(find_program(PROMETHEUS, report=lambda line: print(line, file=sys.stderr)))
    except StartError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
