"""Entry point of `tandem-registry` and of `python -m tandem_registry`.

Imports the rest only after `begin`, so that a signal during the imports ends the process silently. The process
lifecycle is in `tandem.service.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the registry until it is asked to stop."""
    begin()
    from tandem.service import process
    from tandem_registry.app import RegistryApp
    from tandem_registry.config import RegistryConfig

    process.leave(process.main("tandem-registry", RegistryConfig, RegistryApp.open))


if __name__ == "__main__":
    main()
