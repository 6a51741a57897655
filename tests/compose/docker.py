"""Docker and compose as the tests call them: the command lines, and what they say of containers and images.

Owns finding an engine and a compose of version 2, and refusing in one sentence where there is none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
FETCHED_COMPOSE = REPOSITORY / ".cache" / "docker-compose" / "usr" / "libexec" / "docker" / "cli-plugins"
BUILD_TIMEOUT_S = 3600.0


class NoEngineError(Exception):
    """No Docker engine, or no compose, that the tests could run on; says which and what to do."""


class CommandFailed(AssertionError):
    """A docker command ended with another status than 0."""


@dataclass(frozen=True)
class Docker:
    """An engine and the command lines for it."""

    program: str
    compose_program: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Of every command, beside this process's own."""

    def run(self, *arguments: str, timeout_s: float = 120.0, check: bool = True) -> str:
        """Standard output and error of `docker ...`."""
        return self._run((self.program, *arguments), timeout_s, check, {})

    def compose(
        self, *arguments: str, timeout_s: float = 300.0, check: bool = True, settings: dict[str, str] | None = None
    ) -> str:
        """Standard output and error of `docker compose ...`, in the repository; `settings` are variables of it."""
        return self._run((*self.compose_program, *arguments), timeout_s, check, settings or {})

    def inspect(self, what: str) -> dict[str, Any]:
        """All that the engine says of a container or image."""
        found: list[dict[str, Any]] = json.loads(self.run("inspect", what))
        return found[0]

    def has_image(self, name: str) -> bool:
        """Whether the image is there."""
        return bool(self.run("images", "--quiet", name).strip())

    def _run(self, command: tuple[str, ...], timeout_s: float, check: bool, settings: dict[str, str]) -> str:
        environment = {**os.environ, **self.environment, **settings}
        ended = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and ended.returncode:
            raise CommandFailed(f"{' '.join(command)} ended with status {ended.returncode}:\n{ended.stdout[-4000:]}")
        return ended.stdout


def find_docker(environment: dict[str, str]) -> Docker:
    """The engine that answers.

    Raises:
        NoEngineError: says what is missing.
    """
    program = shutil.which("docker")
    if program is None:
        raise NoEngineError("there is no docker on PATH")
    docker = Docker(program, (program, "compose"), environment)
    try:
        docker.run("version", "--format", "{{.Server.Version}}", timeout_s=30)
    except (CommandFailed, subprocess.TimeoutExpired):
        raise NoEngineError("no Docker engine answers (docker version)") from None
    for compose in ((program, "compose"), ("docker-compose",), (str(FETCHED_COMPOSE / "docker-compose"),)):
        if shutil.which(compose[0]) is not None and _is_second(Docker(program, compose, environment)):
            return Docker(program, compose, environment)
    raise NoEngineError("there is no docker compose of version 2")


def _is_second(docker: Docker) -> bool:
    try:
        return docker.compose("version", "--short", timeout_s=30).strip().lstrip("v").startswith(("2.", "5."))
    except CommandFailed:
        return False
