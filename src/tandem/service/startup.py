"""Signal handling while the modules are being imported: a signal exits the process silently.

Imports the standard library only, and is called before all other imports: they take up to a second, and an interrupt
during them would print a traceback. `process.py` handles signals later.
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
    """Exit silently when interrupted, and when the parent in the environment variable is dead.

    Also disables gRPC's fork handlers, before gRPC is imported. uvloop starts processes by fork and exec; while gRPC
    threads run, the handlers sometimes crash the child (signal 11) before the exec: 6 of 150 starts in a measurement,
    and every Envoy of an edge that exports metrics.
    """
    os.environ.setdefault(GRPC_FORKS, "0")
    # A SIGINT that is ignored, as in a shell's background job, stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: _leave(EXIT_INTERRUPTED))
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(EXIT_TERMINATED))
    if not follow_parent(os.environ):
        _leave(EXIT_FAILED)


def _leave(exit_status: int) -> NoReturn:
    run_directory.remove_if_empty()
    os._exit(exit_status)
