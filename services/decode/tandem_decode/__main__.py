"""Entry point of `tandem-decode` and of `python -m tandem_decode`.

Only wires the parts together, and imports them after the signal handlers are installed, so that a signal during the
imports exits without a traceback. `tandem.service.process` owns the process lifecycle.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the worker until a signal or a Drain call stops it."""
    begin()
    from tandem.service import process
    from tandem.worker.app import WorkerHost
    from tandem_decode.config import DecodeConfig

    def build(config: DecodeConfig) -> process.Lifespan:
        return WorkerHost.open(config, config.worker_role)

    process.leave(process.main("tandem-decode", DecodeConfig, build))


if __name__ == "__main__":
    main()
