"""Entry point of `tandem-frontend` and of `python -m tandem_frontend`.

Owns nothing but the names of the parts; the life of the process is `tandem.runtime.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.runtime import process
from tandem_frontend.app import FrontendApp
from tandem_frontend.config import FrontendConfig


def main() -> NoReturn:
    """Run the frontend until it is asked to end."""
    process.leave(process.main("tandem-frontend", FrontendConfig, FrontendApp))


if __name__ == "__main__":
    main()
