"""A program that no package of Python has: the one on PATH, else a copy of Debian's that was fetched once.

Owns where the copies are and that only one process fetches one at a time. How a package is had is
`debian_package.py`'s; which programs there are is said by whoever needs one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import StartError
from tandem.local_cluster import debian_package

CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianProgram:
    """A program and where Debian has it."""

    name: str
    """Of its file."""
    title: str
    """What people call it."""
    package: str
    suite: str


def find_program(
    program: DebianProgram, cache: Path | None = None, tell: Callable[[str], None] = lambda line: None
) -> Path:
    """The program's file. May be called by several processes at the same time; one of them fetches.

    Args:
        program: which one.
        cache: directory of fetched copies; default: `.cache` of a checkout, else the user's.
        tell: is given one line before something is fetched.

    Raises:
        StartError: there is none, and none can be fetched; says why and what to do.
    """
    on_path = shutil.which(program.name)
    if on_path is not None:
        return Path(on_path)
    cache = cache or _cache()
    binary = cache / program.package / "usr" / "bin" / program.name
    try:
        if not _is_program(binary):
            with _one_at_a_time(cache, program.package):
                # Another process may have fetched it while this one waited.
                if not _is_program(binary):
                    tell(f"no {program.name} on PATH: fetching Debian's into {binary.parent}, once")
                    debian_package.unpack(program.package, program.suite, cache / program.package)
    except OSError as problem:
        reason = f"{cache} cannot be written: {problem.strerror}"
        raise StartError(f"{program.title} is not on PATH, and {reason}") from None
    except StartError as problem:
        raise StartError(
            f"{program.title} is not on PATH, and cannot be fetched: {problem}; put {program.title.lower()} on PATH"
        ) from None
    return binary


def _is_program(file: Path) -> bool:
    return file.is_file() and os.access(file, os.X_OK)


def _cache() -> Path:
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


@contextmanager
def _one_at_a_time(cache: Path, package: str) -> Iterator[None]:
    """The lock goes with the process that holds it, however that ends."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
