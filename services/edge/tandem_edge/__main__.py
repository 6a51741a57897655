"""Entry point of `tandem-edge` and of `python -m tandem_edge`.

Imports the rest only after `begin`, so that a signal during the imports ends the process silently. The process
lifecycle is in `tandem.service.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the edge until it is asked to stop."""
    begin()
    from tandem.service import process
    from tandem_edge.app import EdgeApp
    from tandem_edge.config import EdgeConfig

    process.leave(process.main("tandem-edge", EdgeConfig, EdgeApp.open))


if __name__ == "__main__":
    main()
