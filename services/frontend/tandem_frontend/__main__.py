"""Entry point of `tandem-frontend` and of `python -m tandem_frontend`.

Owns nothing but the names of the parts, imported once a signal can end it silently; the life of the process is
`tandem.runtime.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.runtime.beginning import begin


def main() -> NoReturn:
    """Run the frontend until it is asked to end."""
    begin()
    from tandem.runtime import process
    from tandem_frontend.app import FrontendApp
    from tandem_frontend.config import FrontendConfig

    process.leave(process.main("tandem-frontend", FrontendConfig, FrontendApp))


if __name__ == "__main__":
    main()
