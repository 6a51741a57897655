"""A child that ends when its parent does, however the parent ends: the kernel sends it SIGTERM.

For the processes of a local cluster, so that killing `tandem up` leaves nothing behind. Asked for through the
environment, by the parent; a service started by itself knows nothing of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

VARIABLE = "TANDEM_PARENT_PID"
PR_SET_PDEATHSIG = 1


def follow_parent(environ: Mapping[str, str]) -> None:
    """Tie this process to the parent that the environment names; nothing where none is named, or not on Linux."""
    named = environ.get(VARIABLE)
    if named is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # It may have died before the kernel was told.
    if os.getppid() != int(named):
        raise SystemExit(f"the parent process {named} is gone")
