"""The first moments of a process, while its modules are still being imported: a signal ends it silently.

Imports the standard library only, and is called before anything else is imported: importing takes up to a second, and
an interrupt in it would show a traceback. Once a process serves, its signals are `process.py`'s.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from tandem.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED
from tandem.service import run_directory
from tandem.service.parent_death import follow_parent

GRPC_FORKS = "GRPC_ENABLE_FORK_SUPPORT"


def begin() -> None:
    """End silently when interrupted, and when the parent that the environment names is gone.

    Also tells gRPC, before it is imported, that nothing here goes on after a fork. uvloop starts processes by a fork
    that gRPC's handlers see, and while threads of gRPC are at work they end the new process by signal 11 now and then,
    before it has become the program that it should: 6 of 150, and each Envoy of an edge that measures.
    """
    os.environ.setdefault(GRPC_FORKS, "0")
    # An interrupt that is ignored, as in a shell's background job, stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: _leave(EXIT_INTERRUPTED))
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(EXIT_TERMINATED))
    if not follow_parent(os.environ):
        _leave(EXIT_FAILED)


def _leave(exit_status: int) -> NoReturn:
    run_directory.remove_if_empty()
    os._exit(exit_status)
