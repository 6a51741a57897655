"""Entry point of `tandem-frontend` and of `python -m tandem_frontend`.

Imports everything else only after `begin`, so that a signal during the imports ends the process without a traceback.
`tandem.service.process` runs the process.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from tandem.service.startup import begin

if TYPE_CHECKING:
    from tandem.service.process import Lifespan
    from tandem_frontend.config import FrontendConfig


def main() -> NoReturn:
    """Run the frontend until a signal ends it."""
    begin()
    from tandem.service import process
    from tandem.service.prefork.child import find_parent
    from tandem_frontend.config import PROGRAM, FrontendConfig

    parent = find_parent(os.environ)
    if parent is not None:
        from tandem_frontend.processes.child import run

        process.leave(run(parent))
    process.leave(process.main(PROGRAM, FrontendConfig, _build))


def _build(config: FrontendConfig) -> Lifespan:
    """The only process, or the parent of several, which does not import what serves requests."""
    if config.processes == 1:
        from tandem_frontend.app import FrontendApp

        return FrontendApp.open(config)
    from tandem_frontend.processes.parent import FrontendParent

    return FrontendParent.open(config)


if __name__ == "__main__":
    main()
