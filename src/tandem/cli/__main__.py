"""Entry point of `tandem` and of `python -m tandem.cli`.

`begin` runs before the imports: an interrupt during them must not print a traceback.
"""

from __future__ import annotations

import sys

from tandem.service.startup import begin


def main() -> None:
    """Run the command line."""
    begin()
    from tandem.cli.app import run

    sys.exit(run())


if __name__ == "__main__":
    main()
