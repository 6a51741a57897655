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
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from tandem.domain.network_address import join_address
from tandem.errors import StartError
from tandem.observability.logs import is_text
from tandem.service import parent_death, run_directory
from tandem.service.api_keys import ApiKey
from tandem.service.envoy_binary import find_binary
from tandem_edge.config import EdgeConfig
from tandem_edge.endpoints import Endpoint, assignment, replace
from tandem_edge.envoy_admin import Admin
from tandem_edge.keys import key_filter
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
    """One Envoy that accepts requests. `open` makes one."""

    def __init__(self, files: Files, process: asyncio.subprocess.Process) -> None:
        self._files = files
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, config: EdgeConfig, keys: tuple[ApiKey, ...], files: Files, endpoints: Sequence[Endpoint] = ()
    ) -> AsyncIterator[EnvoyProcess]:
        """Start one and wait until it accepts requests; terminate it on exit, which aborts open requests.

        Args:
            config: settings of the edge.
            keys: API keys that it accepts.
            files: paths to render the configuration to, see `private_files`.
            endpoints: the frontends discovered from the registry, if one is set.

        Raises:
            StartError: there is no binary, the port is in use, or Envoy rejects the configuration.
        """
        binary = find_binary(config.envoy)
        _check_port(config.listen_host, config.port)
        for file, content in render(config, keys, files, endpoints).items():
            file.touch(mode=0o600)
            file.write_bytes(content)
        process = await _start(config, binary, files)
        try:
            await _wait_ready(process, Admin(files.admin_socket))
            yield cls(files, process)
        finally:
            await _stop(process)

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace all discovered frontends at once.

        Raises:
            OSError: the endpoint file cannot be written; the previous frontends stay.
        """
        replace(self._files.endpoints, assignment(endpoints))

    def set_keys(self, keys: tuple[ApiKey, ...]) -> None:
        """Replace all API keys at once, for requests that begin from now on.

        Raises:
            OSError: the file cannot be written; the previous keys stay.
        """
        replace(self._files.keys, key_filter(keys))

    def set_connection_pressure(self, part: float) -> None:
        """What part of its connections is in use, 0 to 1.

        Raises:
            OSError: the file cannot be written; the previous value stays.
        """
        replace(self._files.pressure, f"{part:.2f}".encode())

    async def wait_ended(self) -> int:
        """Return its exit status when it exits."""
        return await self._process.wait()


@contextlib.contextmanager
def private_files() -> Iterator[Files]:
    """Files in a new directory with access for its owner only, which is removed on exit."""
    directory = _private_directory()
    try:
        yield Files(directory=directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _start(config: EdgeConfig, binary: Path, files: Files) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", parent_death.__name__, str(binary)),
        *("--config-path", str(files.config), "--concurrency", str(config.threads)),
        *("--log-level", LEVELS[config.log_level], "--disable-hot-restart", "--drain-strategy", "immediate"),
        *(() if is_text(config.log_format) else ("--log-format", JSON_LOG_FORMAT)),
        *("--drain-time-s", "1", "--file-flush-interval-msec", "200"),
        # Silences its warning that api_key_auth is work in progress, see docs/adr/0002.
        *("--component-log-level", "misc:error"),
        stdin=asyncio.subprocess.DEVNULL,
        env={**os.environ, parent_death.VARIABLE: str(os.getpid())},
        # Ctrl-C signals the whole process group; only the edge must get it, so that it drains open requests first.
        start_new_session=True,
    )


async def _wait_ready(process: asyncio.subprocess.Process, admin: Admin) -> None:
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await admin.is_ready():
                if process.returncode is not None:
                    raise StartError(
                        f"Envoy exited with status {process.returncode}; see its log lines above for the reason"
                    )
                await asyncio.sleep(READY_POLL_S)
    except TimeoutError:
        raise StartError(f"Envoy was not ready within {READY_TIMEOUT_S:g} s; its log lines above say why") from None


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Terminate it; kill it after STOP_TIMEOUT_S."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


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
            raise StartError(f"cannot listen on {join_address(host, port)}: {problem.strerror}") from None
