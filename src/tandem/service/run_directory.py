"""Where the processes of a local cluster keep what must not outlive them: sockets, reports of children.

Made by the parent, which names it in the environment and removes it. When the parent was killed, the last of its
children removes it. A service started by itself has none, and uses the system's directory for temporary files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from tandem.service import parent_death

VARIABLE = "TANDEM_RUN_DIRECTORY"


def make() -> Path:
    """A directory for a cluster. Not beside the logs: the path of a socket has 107 bytes at most."""
    return Path(tempfile.mkdtemp(prefix="tandem-run-"))


def make_inside(prefix: str) -> Path:
    """A directory for its owner only: in the cluster's directory, or else in the system's."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get(VARIABLE)))


def remove_if_empty() -> None:
    """Remove the cluster's directory if nobody is left who would: the parent is gone, and no other child is in it."""
    directory = os.environ.get(VARIABLE)
    if directory is not None and parent_death.is_orphan(os.environ):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
