"""What the probes of `tandem doctor` read of this machine. Tests put a scripted machine in its place.

Imports nothing of what it looks for: a package's version comes from its metadata, a program's from running it.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import tandem
from tandem.local_cluster import debian, debian_package
from tandem.service import envoy_binary

DISTRIBUTION = "tandem-serving"
COMMAND_TIMEOUT_S = 10.0
"""A healthy program answers within 0.2 s. The bound is for one that hangs, such as the client of a stuck engine."""
PIN = re.compile(r"([\w.-]+)==([\w.!+-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a program printed."""

    status: int | None
    """Exit status; None: it did not start, or did not end in time."""
    text: str
    """Standard output and standard error, without white space around them."""


class Machine:
    """This machine."""

    def system(self) -> str:
        """Name of the operating system, such as Linux."""
        return platform.system()

    def in_checkout(self) -> bool:
        """Whether Tandem runs from its source tree, where `make setup` works."""
        return (debian.CHECKOUT / "pyproject.toml").is_file()

    def requirements(self) -> Path:
        """Directory of the pinned requirements, which are part of the package."""
        return Path(tandem.__file__).with_name("requirements")

    def pins(self, file: str) -> dict[str, str]:
        """Versions by package of a file of `requirements`; empty if it is not installed."""
        try:
            lines = (self.requirements() / file).read_text().splitlines()
        except OSError:
            return {}
        return {match[1]: match[2] for line in lines if (match := PIN.match(line))}

    def version(self, package: str) -> str | None:
        """Version of an installed package; None: it is not installed."""
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def pinned(self, package: str) -> str | None:
        """Version that Tandem's own metadata pins for a package; None: it pins none."""
        try:
            required = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            return None
        pins = {match[1]: match[2] for one in required if (match := PIN.match(one))}
        return pins.get(package)

    def has_entry_point(self, group: str, name: str) -> bool:
        """Whether an installed package has this entry point."""
        return bool(metadata.entry_points(group=group, name=name))

    def has_package_file(self, package: str, *parts: str) -> bool:
        """Whether the directory of a top-level package has a file; the package is not imported."""
        found = util.find_spec(package)
        folders = (found.submodule_search_locations or []) if found is not None else []
        return any(Path(folder, *parts).is_file() for folder in folders)

    def program(self, name: str) -> Path | None:
        """Path of a program on PATH."""
        found = shutil.which(name)
        return None if found is None else Path(found)

    def envoy(self) -> Path:
        """Envoy's binary, of its package or on PATH.

        Raises:
            StartError: there is none.
        """
        return envoy_binary.find_binary(None)

    def debian_copy(self, program: debian.DebianProgram) -> Path | None:
        """A copy of a Debian program that was downloaded before."""
        return debian.cached_program(program)

    def can_download(self) -> bool:
        """Whether this machine's apt can download Debian's packages."""
        return all(self.program(name) for name in debian_package.PROGRAMS) and bool(debian_package.mirrors())

    def has_library(self, name: str) -> bool:
        """Whether the loader finds a shared library."""
        try:
            ctypes.CDLL(name)
        except OSError:
            return False
        return True

    def run(self, *command: str) -> Output:
        """Run a program to its end, `COMMAND_TIMEOUT_S` at most."""
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
                timeout=COMMAND_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Output(status=None, text=f"did not answer within {COMMAND_TIMEOUT_S:.0f} s")
        except OSError as problem:
            return Output(status=None, text=problem.strerror or str(problem))
        return Output(status=ended.returncode, text=(ended.stdout + ended.stderr).strip())

    def python(self) -> str:
        """Version of this Python."""
        return ".".join(map(str, sys.version_info[:3]))
