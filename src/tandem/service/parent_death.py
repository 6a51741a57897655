"""Stops a child when its parent dies, however the parent dies: the kernel sends the child a signal.

For the processes of a local cluster, so that killing `tandem up` leaves no processes. The parent requests it by an
environment variable; a service without it is not affected. Other programs are started as
`python -m tandem.service.parent_death PROGRAM ARGUMENT ...`, which replaces itself by the program. A preexec_fn is no
alternative: Python code between fork and exec sometimes crashes (SIGSEGV) while gRPC threads run.
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
    """Stop this process when the parent in the environment variable dies; does nothing without the variable, or off
    Linux.

    Returns whether that parent is still alive.
    """
    named = environ.get(VARIABLE)
    return named is None or follow(int(named), signal.SIGTERM)


def follow(parent_pid: int, number: signal.Signals) -> bool:
    """Have the kernel send that signal when the parent dies. Returns whether the parent is still alive."""
    if not sys.platform.startswith("linux"):
        return True
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    # The parent may have died before prctl.
    return os.getppid() == parent_pid


def is_orphan(environ: Mapping[str, str]) -> bool:
    """Whether the parent in the environment variable is dead."""
    named = environ.get(VARIABLE)
    return named is not None and os.getppid() != int(named)


def main() -> None:
    """Stop with the parent, and replace this process by the program in the arguments."""
    if not follow_parent(os.environ):
        sys.exit(1)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 -- becoming another program is the purpose


if __name__ == "__main__":
    main()
