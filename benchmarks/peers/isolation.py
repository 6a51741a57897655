"""Runs the benchmark in a network namespace with loopback only, because some systems listen on all addresses.

Owns the creation of the namespace. Packages must be installed before: no package index is reachable inside.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence

VARIABLE = "TANDEM_BENCHMARK_ISOLATED"
UNSHARE = ("unshare", "--user", "--map-root-user", "--net")
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def is_isolated() -> bool:
    """Whether this process has a network of its own."""
    return VARIABLE in os.environ


def can_isolate() -> bool:
    """Whether this machine lets it have one."""
    if shutil.which(UNSHARE[0]) is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def enter(module: str, arguments: Sequence[str]) -> None:
    """Become the same program in a namespace of its own; does not return."""
    os.environ[VARIABLE] = "1"
    os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, "-m", module, *arguments])


def bring_loopback_up() -> None:
    """A new namespace's loopback is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))
