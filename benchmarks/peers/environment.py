"""Virtual environments of the other systems: one each, so that dependencies do not conflict, from pinned requirements.

Owns what is installed where, and rejects packages that would install PyTorch or CUDA. Starts nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT = REPOSITORY / ".cache" / "peers"
REQUIREMENTS = REPOSITORY / "requirements"
FORBIDDEN = re.compile(r"(torch|nvidia-|triton|cuda)", re.IGNORECASE)
STAMP = "installed.json"


@dataclass(frozen=True)
class Peer:
    """A system from the package index."""

    name: str
    package: str
    """Whose version stands for the system's."""
    requirements: tuple[str, ...]
    """Files under requirements/."""
    without_dependencies: tuple[str, ...] = ()
    """More of them, whose dependencies are not wanted."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("smg", "smg", ("peers-smg.txt",)),
        Peer("sglang-router", "sglang-router", ("peers-sglang-router.txt",)),
        # Plainly installed it asks for a package whose release on the index is a stub that fetches elsewhere.
        Peer("dynamo", "ai-dynamo", ("peers-dynamo.txt",), ("peers-dynamo-nodeps.txt",)),
    )
}


class Unavailable(Exception):
    """A peer cannot be had on this machine; says why."""


class Environment:
    """The folder with all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def python(self, name: str) -> Path:
        """A peer's interpreter."""
        return self._folder / name / "bin" / "python"

    def version(self, name: str) -> str:
        """Of a peer that is installed."""
        package = re.escape(PEERS[name].package)
        pins = "\n".join((REQUIREMENTS / file).read_text() for file in self._files(name))
        found = re.search(rf"^{package}==(\S+)", pins, re.MULTILINE)
        return found[1] if found else "?"

    def ensure(self, name: str) -> None:
        """Install a peer, unless it is there in the pinned versions.

        Raises:
            Unavailable: it cannot be had.
        """
        pins = {file: (REQUIREMENTS / file).read_text() for file in self._files(name)}
        stamp = self._folder / name / STAMP
        if stamp.exists() and json.loads(stamp.read_text()) == pins:
            return
        print(f"installing {name} {self.version(name)} into {self._folder / name}", file=sys.stderr, flush=True)
        venv.create(self._folder / name, with_pip=True, clear=True)
        peer = PEERS[name]
        for file in peer.requirements:
            self._pip(name, "-r", str(REQUIREMENTS / file))
        for file in peer.without_dependencies:
            self._pip(name, "--no-deps", "-r", str(REQUIREMENTS / file))
        stamp.write_text(json.dumps(pins))

    def _files(self, name: str) -> tuple[str, ...]:
        return (*PEERS[name].requirements, *PEERS[name].without_dependencies)

    def _pip(self, name: str, *arguments: str) -> None:
        """Install, after a look at what that would bring."""
        command = [str(self.python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        report = self._folder / name / "report.json"
        self._call([*command, "--dry-run", "--report", str(report), *arguments])
        brought = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
        forbidden = [package for package in brought if FORBIDDEN.match(package)]
        if forbidden:
            raise Unavailable(f"would install {', '.join(forbidden)}")
        self._call([*command, *arguments])

    @staticmethod
    def _call(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise Unavailable(said[-1].removeprefix("ERROR: "))
