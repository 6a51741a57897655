"""Finds a program that is not on PyPI: the one on PATH, else a copy from a Debian package that is downloaded once.

Owns the cache of copies, and the lock that lets only one process download at a time. `debian_package.py` downloads; the
callers name the programs.
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
    """A program and its Debian package."""

    name: str
    """Name of its executable."""
    title: str
    """Its name in messages."""
    package: str
    suite: str


def find_program(
    program: DebianProgram, cache: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Path of the program. Safe for several processes at the same time; one of them downloads.

    Args:
        program: the program.
        cache: directory of downloaded copies; default: `.cache` of a checkout, else the user's.
        report: gets one line before a download.

    Raises:
        StartError: there is none, and the download failed; the message says why and what to do.
    """
    on_path = shutil.which(program.name)
    if on_path is not None:
        return Path(on_path)
    cache = cache or _cache()
    binary = _copy(program, cache)
    try:
        if not _is_program(binary):
            with _one_at_a_time(cache, program.package):
                # Another process may have downloaded it while this one waited for the lock.
                if not _is_program(binary):
                    report(f"no {program.name} on PATH: downloading Debian's package into {binary.parent}, once")
                    debian_package.unpack(program.package, program.suite, cache / program.package)
    except OSError as problem:
        reason = f"{cache} cannot be written: {problem.strerror}"
        raise StartError(f"{program.title} is not on PATH, and {reason}") from None
    except StartError as problem:
        raise StartError(
            f"{program.title} is not on PATH, and the download failed: {problem}; put {program.title.lower()} on PATH"
        ) from None
    return binary


def cached_program(program: DebianProgram, cache: Path | None = None) -> Path | None:
    """The copy that `find_program` downloaded before; None: there is none."""
    binary = _copy(program, cache or _cache())
    return binary if _is_program(binary) else None


def _copy(program: DebianProgram, cache: Path) -> Path:
    return cache / program.package / "usr" / "bin" / program.name


def _is_program(file: Path) -> bool:
    return file.is_file() and os.access(file, os.X_OK)


def _cache() -> Path:
    if (CHECKOUT / "pyproject.toml").is_file():
        return CHECKOUT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


@contextmanager
def _one_at_a_time(cache: Path, package: str) -> Iterator[None]:
    """Hold the download lock; the kernel releases it when the process exits, however it exits."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
