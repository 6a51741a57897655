"""The log directory of `tandem up` and `tandem demo`: `logs/<start time>` beside the state file.

Owns its creation and retention: the newest `KEPT_COUNT` are kept. Created only after all settings have been checked.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from tandem.cli.state import read_log_directory, state_file
from tandem.errors import ConfigError

KEPT_COUNT = 5
NAME = re.compile(r"\d{8}-\d{6}-\d+")
"""Start time and process id, so that names sort by time."""


def make_log_directory(given: Path | None) -> Path:
    """Create the log directory: `given`, or a new one beside the state file.

    Raises:
        ConfigError: `given` cannot be created or written to.
    """
    if given is not None:
        return _make_given(given)
    parent = state_file().parent / "logs"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        (parent / name).mkdir(parents=True)
    except OSError:
        # The directory of the state file is read-only, as in a container image.
        return Path(tempfile.mkdtemp(prefix="tandem-logs-"))
    _remove_old(parent)
    return parent / name


def _make_given(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError("log_dir", f"{directory}, or a parent of it, is not a directory") from None
    except OSError as problem:
        raise ConfigError("log_dir", f"{directory} cannot be created: {problem.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError("log_dir", f"{directory} is not writable")
    return directory


def _remove_old(parent: Path) -> None:
    in_use = read_log_directory()
    found = sorted(path for path in parent.iterdir() if NAME.fullmatch(path.name))
    for path in found[:-KEPT_COUNT]:
        if path != in_use:
            shutil.rmtree(path, ignore_errors=True)
