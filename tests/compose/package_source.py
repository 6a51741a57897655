"""This machine's own pip configuration, in a form that a build in a container can use.

Owns the rewriting: directories of this machine become addresses of a server of files on loopback, which a build on the
host's network reaches. What it makes is given to a build as a secret and committed nowhere.
"""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CARRIED = ("index-url", "extra-index-url", "find-links", "trusted-host")


@dataclass(frozen=True, slots=True)
class PackageSource:
    """Files to give to a build as the secrets `pip_conf` and `ca_bundle`."""

    pip_conf: Path
    ca_bundle: Path


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Nothing: pip reports what it cannot get."""


@contextmanager
def package_source(directory: Path) -> Iterator[PackageSource]:
    """Write the two files into `directory`, and serve what they name as long as the context is open."""
    settings = _pip_settings()
    handler = functools.partial(_Quiet, directory="/")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, name="package-source")
    thread.start()
    try:
        yield _write(directory, settings, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _pip_settings() -> dict[str, str]:
    """pip's settings on this machine, by files and variables; variables win, as they do for pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found: dict[str, str] = {}
    for scope in ("global", "site", "user", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{scope}."):
                found[name.removeprefix(f"{scope}.")] = value.strip("'\"").replace("\\n", " ")
    return found


def _write(directory: Path, settings: dict[str, str], files_url: str) -> PackageSource:
    lines = ["[global]"]
    for name in CARRIED:
        if settings.get(name):
            lines.append(f"{name} = {' '.join(_address(place, files_url) for place in settings[name].split())}")
    source = PackageSource(directory / "pip.conf", directory / "ca.pem")
    source.pip_conf.write_text("\n".join(lines) + "\n")
    given = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    source.ca_bundle.write_bytes(Path(given).read_bytes() if given else b"")
    return source


def _address(place: str, files_url: str) -> str:
    """A place that only this machine knows becomes an address; a directory ends with a slash, or pip opens no links."""
    path = place.removeprefix("file://")
    if not path.startswith("/"):
        return place
    return f"{files_url}{path}/" if Path(path).is_dir() else f"{files_url}{path}"
