"""The Envoy process: its start and its stop.

Owns the process and its rendered files. `app.py` drains it: it knows when no request is open any more.
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
from tandem_edge.render import Files, render

READY_POLL_S = 0.02
READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
SOCKET_PATH_BYTES_MAX = 100
LEVELS = {"debug": "info", "info": "warning", "warning": "warning", "error": "error"}
"""Envoy's level for each of ours: its info is as verbose as our debug, and its debug logs request headers with API
keys.
"""

JSON_LOG_FORMAT = (
    '{"time": "%Y-%m-%dT%H:%M:%S.%eZ", "level": "%l", "service": "envoy", "logger": "%n", "message": "%j"}'
)


class EnvoyProcess:
    """One Envoy."""

    def __init__(self, config: EdgeConfig, keys: tuple[ApiKey, ...]) -> None:
        self._config = config
        self._keys = keys
        self._files: Files | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def admin(self) -> Admin:
        """Its admin interface."""
        assert self._files is not None, "admin before start()"
        return Admin(self._files.admin_socket)

    async def start(self, endpoints: Sequence[Endpoint] = ()) -> None:
        """Return when it accepts requests; `endpoints` are the frontends discovered from the registry, if one is set.

        Raises:
            StartError: there is no binary, the port is in use, or Envoy rejects the configuration.
        """
        binary = find_binary(self._config.envoy)
        _check_port(self._config.listen_host, self._config.port)
        self._files = Files(directory=_private_directory())
        for file, content in render(self._config, self._keys, self._files, endpoints).items():
            file.touch(mode=0o600)
            file.write_bytes(content)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", parent_death.__name__, str(binary)),
            *("--config-path", str(self._files.config), "--concurrency", str(self._config.threads)),
            *("--log-level", LEVELS[self._config.log_level], "--disable-hot-restart", "--drain-strategy", "immediate"),
            *(() if is_text(self._config.log_format) else ("--log-format", JSON_LOG_FORMAT)),
            *("--drain-time-s", "1", "--file-flush-interval-msec", "200"),
            # Silences its warning that api_key_auth is work in progress, see docs/adr/0002.
            *("--component-log-level", "misc:error"),
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, parent_death.VARIABLE: str(os.getpid())},
            # Ctrl-C signals the whole process group; only the edge must get it, so that it drains open requests first.
            start_new_session=True,
        )
        await self._wait_ready(self._process)

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self.admin.is_ready():
                    if process.returncode is not None:
                        raise StartError(
                            f"Envoy exited with status {process.returncode}; see its log lines above for the reason"
                        )
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise StartError(f"Envoy was not ready within {READY_TIMEOUT_S:g} s") from None

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace all discovered frontends at once.

        Raises:
            OSError: the endpoint file cannot be written; the previous frontends stay.
        """
        assert self._files is not None, "set_endpoints() before start()"
        replace(self._files.endpoints, assignment(endpoints))

    async def wait_ended(self) -> int:
        """Return its exit status when it exits."""
        assert self._process is not None, "wait_ended() before start()"
        return await self._process.wait()

    async def stop(self) -> None:
        """Terminate it and remove its files; aborts open requests. May be called twice, and when `start` failed."""
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
        if self._files is not None:
            shutil.rmtree(self._files.directory, ignore_errors=True)


def _private_directory() -> Path:
    """A directory with access for its owner only, and a path short enough for a unix socket in it."""
    directory = run_directory.make_inside("tandem-edge-")
    if len(bytes(directory / "admin.sock")) > SOCKET_PATH_BYTES_MAX:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="tandem-edge-", dir="/tmp"))
    return directory


def _check_port(host: str, port: int) -> None:
    """Check that the port is free, for a short error: Envoy's own is a paragraph."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise StartError(f"cannot listen on {host}:{port}: {problem.strerror}") from None
