"""Consul's binary: the one on PATH, else a copy of Debian's that was fetched once.

Owns where the copy is and that only one process fetches it at a time. How a package is had is `debian_package.py`'s.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.errors import StartError
from tandem.runtime import debian_package

NAME = "consul"
SUITE = "bullseye"
"""The last suite of Debian that has Consul: 1.8.7."""
CHECKOUT = Path(__file__).parents[3]


def find_consul(cache: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The binary. May be called by several processes at the same time; one of them fetches.

    Args:
        cache: directory of fetched copies; default: `.cache` of a checkout, else the user's.
        tell: is given one line before something is fetched.

    Raises:
        StartError: there is none, and none can be fetched; says why and what to do.
    """
    on_path = shutil.which(NAME)
    if on_path is not None:
        return Path(on_path)
    cache = cache or _cache()
    binary = cache / NAME / "usr" / "bin" / NAME
    try:
        if not _is_program(binary):
            with _one_at_a_time(cache):
                # Another process may have fetched it while this one waited.
                if not _is_program(binary):
                    tell(f"no {NAME} on PATH: fetching Debian's into {binary.parent}, once")
                    debian_package.unpack(NAME, SUITE, cache / NAME)
    except OSError as problem:
        raise StartError(f"Consul is not on PATH, and {cache} cannot be written: {problem.strerror}") from None
    except StartError as problem:
        raise StartError(f"Consul is not on PATH, and cannot be fetched: {problem}; put consul on PATH") from None
    return binary


def _is_program(file: Path) -> bool:
    return file.is_file() and os.access(file, os.X_OK)


def _cache() -> Path:
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """The lock goes with the process that holds it, however that ends."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
