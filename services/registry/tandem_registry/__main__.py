"""Entry point of `tandem-registry` and of `python -m tandem_registry`.

Owns nothing but the names of the parts, imported once a signal can end it silently; the life of the process is
`tandem.service.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the registry until it is asked to end."""
    begin()
    from tandem.service import process
    from tandem_registry.app import RegistryApp
    from tandem_registry.config import RegistryConfig

    process.leave(process.main("tandem-registry", RegistryConfig, RegistryApp))


if __name__ == "__main__":
    main()
