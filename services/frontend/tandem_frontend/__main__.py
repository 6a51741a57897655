"""Entry point of `tandem-frontend` and of `python -m tandem_frontend`.

Owns nothing but the names of the parts; the life of the process is `tandem.runtime.process`.
"""

from __future__ import annotations

import sys

from tandem.runtime import process
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig


def main() -> None:
    """Run the frontend until it is asked to end."""
    sys.exit(process.main("tandem-frontend", FrontendConfig, FrontendApp))


if __name__ == "__main__":
    main()
