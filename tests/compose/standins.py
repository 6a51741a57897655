"""Local images under the names of the public ones that the files name, where those cannot be pulled.

The base is Debian with its own Python, from debootstrap; Consul is the binary that the tests use elsewhere. Both are
what the real ones are in the ways that count here: the same paths, no pip, a user without a name. Never made over an
image that is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tandem.local_cluster import debian_package
from tandem.local_cluster.consul_binary import find_consul
from tests.compose.docker import REPOSITORY, CommandFailed, Docker

SUITE = "bookworm"
UNSHIPPED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
)
"""Left out of slim images."""


def python_image() -> str:
    """Name of the base that the Dockerfiles use."""
    text = (REPOSITORY / "services" / "registry" / "Dockerfile").read_text()
    found = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def consul_image() -> str:
    """Name of Consul's image in docker-compose.yml."""
    found = re.search(r"\$\{CONSUL_IMAGE:-([^}]+)\}", (REPOSITORY / "docker-compose.yml").read_text())
    assert found is not None
    return found[1]


def prepare(docker: Docker) -> list[str]:
    """Have every public image: pulled where that works, else a stand-in. Returns the names that are stand-ins."""
    made = []
    for name, make in ((python_image(), _make_python), (consul_image(), _make_consul)):
        if docker.has_image(name):
            made += [name] if _is_standin(docker, name) else []
            continue
        try:
            docker.run("pull", "--quiet", name, timeout_s=600)
        except CommandFailed:
            make(docker, name)
            made.append(name)
    return made


def _is_standin(docker: Docker, name: str) -> bool:
    return "tandem.standin" in (docker.inspect(name)["Config"].get("Labels") or {})


def _make_python(docker: Docker, name: str) -> None:
    """Debian's own Python at the paths of the public image's."""
    mirror = debian_package.mirrors()[0]
    with tempfile.TemporaryDirectory(prefix="tandem-base-") as work:
        root = Path(work) / "root"
        bootstrap = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv"]
        try:
            _shell(*bootstrap, SUITE, str(root), mirror.uri)
        finally:
            # Mounted by debootstrap; left behind where it was cut short, and nothing that may be removed with the rest.
            subprocess.run(["umount", str(root / "proc")], capture_output=True, check=False)
        for folder in UNSHIPPED:
            shutil.rmtree(root / folder, ignore_errors=True)
        for link in ("python3", "python"):
            (root / "usr/local/bin" / link).symlink_to("/usr/bin/python3")
        archive = Path(work) / "base.tar"
        _shell("tar", "-C", str(root), "--one-file-system", "-cf", str(archive), ".")
        docker.run("import", "--change", "LABEL tandem.standin=1", str(archive), name, timeout_s=300)


def _make_consul(docker: Docker, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-consul-") as work:
        shutil.copy(find_consul(report=print), Path(work) / "consul")
        (Path(work) / "Dockerfile").write_text(
            f"FROM {python_image()}\nLABEL tandem.standin=1\nCOPY consul /bin/consul\nRUN mkdir -p /consul/data\n"
        )
        docker.run("build", "--quiet", "--tag", name, work, timeout_s=300)


def _shell(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CommandFailed(
            f"{command[0]} ended with status {ended.returncode}: {ended.stdout[-500:]}{ended.stderr[-500:]}"
        )
