"""Prints where Consul's binary is; fetches Debian's into .cache when none is on PATH. Standard library only.

PATH="$(dirname "$(python tools/consul_binary.py)"):$PATH"
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from tandem.errors import StartError
from tandem.local_cluster.consul_binary import find_consul


def main() -> int:
    try:
        print(find_consul(report=lambda line: print(line, file=sys.stderr)))
    except StartError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
