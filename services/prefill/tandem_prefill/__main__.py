"""Entry point of `tandem-prefill` and of `python -m tandem_prefill`.

Only wires the parts together, and imports them after the signal handlers are installed, so that a signal during the
imports exits without a traceback. `tandem.service.process` owns the process lifecycle.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the worker until a signal or a Drain call stops it."""
    begin()
    from tandem.domain.worker import WorkerRole
    from tandem.service import process
    from tandem.worker.app import WorkerHost
    from tandem_prefill.config import PrefillConfig

    def build(config: PrefillConfig) -> process.Lifespan:
        return WorkerHost.open(config, WorkerRole.PREFILL)

    process.leave(process.main("tandem-prefill", PrefillConfig, build))


if __name__ == "__main__":
    main()
