"""Writes requirements/hashes/PYTHON-PLATFORM.txt: what registry, frontend and edge install, each with its SHA-256.

pip resolves requirements/base.txt and edge.txt without installing anything, and reports the hash that the index states
for each file. The hashes are of the wheels for this Python and platform; another one needs a file of its own. With it,
pip takes nothing else:

    pip install --require-hashes --only-binary :all: -r requirements/hashes/cp311-linux_x86_64.txt

--check compares the versions with the pins, and asks no index.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from packaging.utils import canonicalize_name

from tools.gen_constraints import listed

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
HASHES = REQUIREMENTS / "hashes"
SOURCES = ("base.txt", "edge.txt")
CONSTRAINTS = REQUIREMENTS / "constraints.txt"
HEAD = """# Every package of registry, frontend and edge, with the SHA-256 of its wheel: written by tools/gen_hashes.py.
# pip install --require-hashes --only-binary :all: -r THIS_FILE
"""
LINE = re.compile(r"(?P<name>[a-z0-9.-]+)==(?P<version>\S+) --hash=sha256:(?P<hash>[0-9a-f]{64})")


def file_here() -> Path:
    """The file for this Python and platform."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return HASHES / f"cp{sys.version_info.major}{sys.version_info.minor}-{platform}.txt"


def resolve() -> list[dict[str, Any]]:
    """pip's report of what it would install.

    Raises:
        CalledProcessError: pip found no solution, or no index.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        sources = [part for name in SOURCES for part in ("-r", str(REQUIREMENTS / name))]
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", str(report)]
        command = [sys.executable, "-m", "pip", "install", *options, "-c", str(CONSTRAINTS), *sources]
        subprocess.run(command, check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def text_of(installed: list[dict[str, Any]]) -> str:
    """The file.

    Raises:
        SystemExit: a package comes from no index, or the index gives no SHA-256 for it; names it.
    """
    lines = []
    for one in installed:
        name, version = canonicalize_name(one["metadata"]["name"]), one["metadata"]["version"]
        if one["download_info"]["url"].startswith("file:"):
            sys.exit(f"{name} comes from a directory, and not from an index: run this with PIP_CONFIG_FILE=/dev/null")
        sha256 = one["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha256 is None:
            sys.exit(f"the index gives no SHA-256 for {name} {version}")
        lines.append(f"{name}=={version} --hash=sha256:{sha256}\n")
    return HEAD + "".join(sorted(lines))


def hashed(file: Path) -> dict[str, str]:
    """Version of each package in a file of hashes.

    Raises:
        SystemExit: a line has another form; names it.
    """
    found = {}
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            sys.exit(f"{file.name}: not a pin with a hash: {line}")
        found[match["name"]] = match["version"]
    return found


def differences(file: Path) -> list[str]:
    """Pins that the file does not have, and versions that are not the pinned ones."""
    found = hashed(file)
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    direct = {canonicalize_name(one.name) for name in SOURCES for one in listed(name)}
    missing = [f"{name} is missing" for name in sorted(direct - set(found))]
    return missing + [
        f"{name} is {version}, pinned to {pins[name]}"
        for name, version in sorted(found.items())
        if pins.get(name, version) != version
    ]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        wrong = [f"{file.name}: {line}" for file in HASHES.glob("*.txt") for line in differences(file)]
        print("\n".join(wrong) or "the hashes are of the pinned versions", file=sys.stderr if wrong else sys.stdout)
        return min(1, len(wrong))
    file_here().write_text(text_of(resolve()))
    print(file_here().relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
