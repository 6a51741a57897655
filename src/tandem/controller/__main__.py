"""Entry point of `python -m tandem.controller`, and of `tandem controller`."""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the controller until it is asked to stop."""
    begin()
    from tandem.controller.app import ControllerApp
    from tandem.controller.settings import ControllerConfig
    from tandem.service import process

    process.leave(process.main("tandem-controller", ControllerConfig, ControllerApp.open))


if __name__ == "__main__":
    main()
