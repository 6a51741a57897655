"""Entry point of `tandem-decode` and of `python -m tandem_decode`.

Owns nothing but the names of the parts, imported once a signal can end it silently; the life of the process is
`tandem.service.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the worker until it is asked to end."""
    begin()
    from tandem.service import process
    from tandem.worker.app import WorkerHost
    from tandem.worker.roles import decode
    from tandem_decode.config import DecodeConfig

    def build(config: DecodeConfig) -> WorkerHost:
        return WorkerHost(config, config.worker_role, decode.services)

    process.leave(process.main("tandem-decode", DecodeConfig, build))


if __name__ == "__main__":
    main()
