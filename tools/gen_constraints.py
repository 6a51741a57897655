"""Writes requirements/constraints.txt: every package that `make setup` installs, at its exact version.

Run it in an environment that was just set up, after a version changed in pyproject.toml or requirements/. It follows
what the listed packages ask for, so that it finds one that no file lists. --check writes nothing and fails when the
file differs. The versions are those for this Python; a package that only another one needs is not pinned.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.markdown import write_or_check
from tools.setup_environment import LISTED, REQUIREMENTS, TORCH, WITHOUT_DEPENDENCIES

FILE = REQUIREMENTS / "constraints.txt"
HEAD = """# Every package that `make setup` installs, written by tools/gen_constraints.py; not to be edited.
# torch is without the local part of its version: the index decides which build it is, see torch.txt.
"""
ACCELERATOR = re.compile(r"(nvidia|cuda|triton)(-|$)")
"""What only torch's CUDA builds ask for."""


def listed(name: str) -> list[Requirement]:
    """The requirements of one file of requirements/."""
    lines = (line.partition("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins() -> dict[str, str]:
    """Version of every package that the set-up installs, by its normalised name.

    Raises:
        SystemExit: a package is not installed; names it.
    """
    alone = [one for name in WITHOUT_DEPENDENCIES for one in listed(name)]
    found = {canonicalize_name(one.name): _installed(one.name) for one in alone}
    wanted = [one for name in (TORCH, *LISTED) for one in listed(name)]
    visited: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        one = wanted.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        found[name] = _installed(name)
        wanted += _dependencies(name, extras)
    return dict(sorted(found.items()))


def _dependencies(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in requires(name) or ():
        one = Requirement(text)
        environments: list[dict[str, str]] = [{"extra": extra} for extra in ("", *extras)]
        if one.marker is not None and not any(one.marker.evaluate(environment) for environment in environments):
            continue
        if not ACCELERATOR.match(canonicalize_name(one.name)):
            yield one


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        sys.exit(f"{name} is not installed: run make setup first")


def main() -> int:
    text = HEAD + "".join(f"{name}=={pinned}\n" for name, pinned in pins().items())
    return write_or_check(FILE, text, "what is installed here", Path(__file__).name)


if __name__ == "__main__":
    sys.exit(main())
