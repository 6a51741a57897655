"""Directory for temporary files of a local cluster: sockets, reports of children.

The parent creates it, passes it to children in an environment variable, and removes it. If the parent was killed, its
last child removes it. A service without a parent uses the system's directory for temporary files.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from tandem.service import parent_death

VARIABLE = "TANDEM_RUN_DIRECTORY"


def make() -> Path:
    """Create the directory of a cluster. Not beside the logs, because a socket path has at most 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="tandem-run-"))


def make_inside(prefix: str) -> Path:
    """Create a private directory in the cluster's directory, or else in the system's."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get(VARIABLE)))


def remove_if_empty() -> None:
    """Remove the cluster's directory if the parent is dead and no other child uses it."""
    directory = os.environ.get(VARIABLE)
    if directory is not None and parent_death.is_orphan(os.environ):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()
