"""A Docker engine of the tests' own, out of Debian's packages, for a machine that is root and has none.

Owns installing docker.io and debootstrap, fetching compose out of the suite trixie, and a daemon with its data below
`.cache`, which ends with the tests. Started only where the command line asks for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.local_cluster import debian_package
from tests.compose.docker import FETCHED_COMPOSE, REPOSITORY, NoEngineError

PACKAGES = ("docker.io", "debootstrap")
COMPOSE_SUITE = "trixie"
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0


@contextmanager
def debian_engine() -> Iterator[dict[str, str]]:
    """The variables that lead docker to an engine which runs as long as the context is open.

    Raises:
        NoEngineError: it cannot be had.
    """
    if os.geteuid() != 0:
        raise NoEngineError("an engine of the tests' own needs root")
    _install()
    home = REPOSITORY / ".cache" / "docker-engine"
    home.mkdir(parents=True, exist_ok=True)
    socket = home / "docker.sock"
    log = home / "dockerd.log"
    command = ["dockerd", f"--data-root={home / 'data'}", f"--exec-root={home / 'run'}", f"--host=unix://{socket}"]
    with log.open("wb") as sink:
        # In a session of its own: Ctrl-C is for the tests, which still need it to tear down.
        daemon = subprocess.Popen(
            [*command, f"--pidfile={home / 'dockerd.pid'}"], stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        _wait_answer(daemon, socket, log)
        yield {"DOCKER_HOST": f"unix://{socket}"}
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(END_TIMEOUT_S)


def _install() -> None:
    if any(shutil.which(program) is None for program in ("dockerd", "docker", "debootstrap")):
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
        subprocess.run(
            install, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        )
    if not (FETCHED_COMPOSE / "docker-compose").is_file():
        debian_package.unpack("docker-compose", COMPOSE_SUITE, FETCHED_COMPOSE.parents[3])


def _wait_answer(daemon: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    ask = ["docker", "--host", f"unix://{socket}", "version"]
    end_s = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(ask, capture_output=True, check=False).returncode:
        if daemon.poll() is not None or time.monotonic() > end_s:
            lines = log.read_text(errors="replace").splitlines()
            raise NoEngineError(f"dockerd does not start: {lines[-1] if lines else 'it said nothing'}")
        time.sleep(0.2)
