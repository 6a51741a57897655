"""Where the console of `tandem up` listens, and the key that opens it.

Owns the file of keys beside the state file. It is kept, so that a browser that has the key once can use it again.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from tandem.domain.network_address import bare_host
from tandem.errors import StartError
from tandem.service.api_keys import read_keys

FILE = "console.keys"
CLIENT_ID = "console"
KEY_BYTES = 18


@dataclass(frozen=True, slots=True)
class ConsoleAccess:
    """The console of a local cluster."""

    port: int
    keys: Path
    """File of keys, readable by its owner only."""


def prepare(directory: Path, host: str, port: int) -> ConsoleAccess:
    """Make the file of keys in `directory` unless it is there, and choose a free port on `host` if `port` is 0.

    The port is chosen here, because the frontend of several processes cannot: another process of it listens there after
    a restart.

    Raises:
        ConfigError: the file cannot be used.
        StartError: it cannot be written, or no port is free.
    """
    file = directory / FILE
    if not file.exists():
        _write(file)
    read_keys(file, "console_keys")
    return ConsoleAccess(port or _free_port(host), file)


def key_of(file: Path) -> str:
    """The first key of a file.

    Raises:
        ConfigError: the file cannot be used.
    """
    return read_keys(file, "console_keys")[0].key


def _write(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as keys:
            keys.write(f"{CLIENT_ID}: {secrets.token_urlsafe(KEY_BYTES)}\n")
    except OSError as problem:
        raise StartError(f"{file} cannot be written: {problem.strerror or problem}") from None


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((bare_host(host), 0))
            return int(probe.getsockname()[1])
    except OSError as problem:
        raise StartError(f"no port on {host} is free for the console: {problem.strerror or problem}") from None
