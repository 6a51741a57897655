"""A child that ends when its parent does, however the parent ends: the kernel sends it a signal.

For the processes of a local cluster, so that killing `tandem up` leaves nothing behind. Asked for through the
environment, by the parent; a service started by itself knows nothing of it. A program that is not ours is started as
`python -m tandem.service.parent_death PROGRAM ARGUMENT ...` and replaces that process: Python between fork and exec,
in a process whose threads are inside gRPC, ends now and then in a segmentation fault.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

VARIABLE = "TANDEM_PARENT_PID"
PR_SET_PDEATHSIG = 1


def follow_parent(environ: Mapping[str, str]) -> bool:
    """Tie this process to the parent that the environment names; nothing where none is named, or not on Linux.

    Returns whether that parent is still there.
    """
    named = environ.get(VARIABLE)
    return named is None or follow(int(named), signal.SIGTERM)


def follow(parent_pid: int, number: signal.Signals) -> bool:
    """Let the kernel send that signal when the parent ends. Returns whether the parent is still there."""
    if not sys.platform.startswith("linux"):
        return True
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    # It may have died before the kernel was told.
    return os.getppid() == parent_pid


def is_orphan(environ: Mapping[str, str]) -> bool:
    """Whether the parent that the environment names is gone."""
    named = environ.get(VARIABLE)
    return named is not None and os.getppid() != int(named)


def main() -> None:
    """Tie this process to its parent, and become the program that the arguments name."""
    if not follow_parent(os.environ):
        sys.exit(1)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 -- becoming another program is the purpose


if __name__ == "__main__":
    main()
