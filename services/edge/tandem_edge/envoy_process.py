"""The Envoy process: its start and its end.

Owns the process and the files it was rendered. Draining is `app.py`'s, which knows when nothing is open any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tandem.errors import StartError
from tandem.observability.logs import is_text
from tandem.service import parent_death, run_directory
from tandem.service.envoy_binary import find_binary
from tandem_edge.config import EdgeConfig
from tandem_edge.endpoints import Endpoint, assignment, replace
from tandem_edge.envoy_admin import Admin
from tandem_edge.keys import ApiKey
from tandem_edge.render import Places, render

READY_POLL_S = 0.02
READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
SOCKET_PATH_BYTES_MAX = 100
LEVELS = {"debug": "info", "info": "warning", "warning": "warning", "error": "error"}
"""Envoy tells at info what is debugging to us, and at debug the headers of requests, keys included."""

JSON_LOG_FORMAT = (
    '{"time": "%Y-%m-%dT%H:%M:%S.%eZ", "level": "%l", "service": "envoy", "logger": "%n", "message": "%j"}'
)


class EnvoyProcess:
    """One Envoy."""

    def __init__(self, config: EdgeConfig, keys: tuple[ApiKey, ...]) -> None:
        self._config = config
        self._keys = keys
        self._places: Places | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def admin(self) -> Admin:
        """Its admin interface."""
        assert self._places is not None, "admin before start()"
        return Admin(self._places.admin_socket)

    async def start(self, endpoints: Sequence[Endpoint] = ()) -> None:
        """Return when it takes requests; `endpoints` are the frontends that the registry lists, where it is followed.

        Raises:
            StartError: there is no binary, the port is taken, or Envoy refuses the configuration.
        """
        binary = find_binary(self._config.envoy)
        _check_port(self._config.listen_host, self._config.port)
        self._places = Places(directory=_private_directory())
        for file, content in render(self._config, self._keys, self._places, endpoints).items():
            file.touch(mode=0o600)
            file.write_bytes(content)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", parent_death.__name__, str(binary)),
            *("--config-path", str(self._places.config), "--concurrency", str(self._config.threads)),
            *("--log-level", LEVELS[self._config.log_level], "--disable-hot-restart", "--drain-strategy", "immediate"),
            *(() if is_text(self._config.log_format) else ("--log-format", JSON_LOG_FORMAT)),
            *("--drain-time-s", "1", "--file-flush-interval-msec", "200"),
            # Its remark that api_key_auth is marked as unfinished: docs/adr/0002 knows.
            *("--component-log-level", "misc:error"),
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, parent_death.VARIABLE: str(os.getpid())},
            # A signal to the whole group (Ctrl-C) is for the edge alone, which lets open requests end first.
            start_new_session=True,
        )
        await self._wait_ready(self._process)

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self.admin.is_ready():
                    if process.returncode is not None:
                        raise StartError(
                            f"Envoy ended with status {process.returncode}; its reason is in the log above"
                        )
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise StartError(f"Envoy was not ready within {READY_TIMEOUT_S:g} s") from None

    def take(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace the frontends that the registry lists, all at once.

        Raises:
            OSError: the file cannot be written; those before stay.
        """
        assert self._places is not None, "take() before start()"
        replace(self._places.endpoints, assignment(endpoints))

    async def wait_ended(self) -> int:
        """Return its exit status when it ends."""
        assert self._process is not None, "wait_ended() before start()"
        return await self._process.wait()

    async def stop(self) -> None:
        """End it and remove its files. What is still open is cut. May be called twice, and when `start` failed."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._places is not None:
            shutil.rmtree(self._places.directory, ignore_errors=True)


def _private_directory() -> Path:
    """A directory for its owner only, short enough for a socket in it."""
    directory = run_directory.make_inside("tandem-edge-")
    if len(bytes(directory / "admin.sock")) > SOCKET_PATH_BYTES_MAX:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="tandem-edge-", dir="/tmp"))
    return directory


def _check_port(host: str, port: int) -> None:
    """Envoy says it in a paragraph; we say it in a sentence."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise StartError(f"cannot listen on {host}:{port}: {problem.strerror}") from None
