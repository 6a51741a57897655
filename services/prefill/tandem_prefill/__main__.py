"""Entry point of `tandem-prefill` and of `python -m tandem_prefill`.

Owns nothing but the names of the parts, imported once a signal can end it silently; the life of the process is
`tandem.service.process`.
"""

from __future__ import annotations

from typing import NoReturn

from tandem.service.startup import begin


def main() -> NoReturn:
    """Run the worker until it is asked to end."""
    begin()
    from tandem.domain.worker import WorkerRole
    from tandem.service import process
    from tandem.worker.app import WorkerHost
    from tandem.worker.roles import prefill
    from tandem_prefill.config import PrefillConfig

    def build(config: PrefillConfig) -> WorkerHost:
        return WorkerHost(config, WorkerRole.PREFILL, prefill.services)

    process.leave(process.main("tandem-prefill", PrefillConfig, build))


if __name__ == "__main__":
    main()
