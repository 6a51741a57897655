"""Entry point of `tandem-edge` and of `python -m tandem.edge`.

Owns nothing but the names of the parts, imported once a signal can end it silently; the life of the process is
`tandem.runtime.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.runtime.beginning import begin


def main() -> NoReturn:
    """Run the edge until it is asked to end."""
    begin()
    from tandem.edge.app import EdgeApp
    from tandem.edge.config import EdgeConfig
    from tandem.runtime import process

    process.leave(process.main("tandem-edge", EdgeConfig, EdgeApp))


if __name__ == "__main__":
    main()
