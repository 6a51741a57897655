"""A Consul agent of a local cluster: its ports, configuration, start and stop.

Listens on loopback only, and keeps its data until `forget` or `clean`. For development: one server, or a few that
join each other; for production see deploy/consul.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import StartError
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.consul_binary import find_consul
from tandem.local_cluster.consul_http import ConsulAccess
from tandem.service import parent_death
from tandem.tls.paths import Tls

HOST = "127.0.0.1"
PORTS = range(20_000, 32_000)
"""Below the ephemeral ports of outgoing connections, so that an agent's ports stay free while it is stopped."""
LOG_LEVEL = "warn"
GRPC_TLS_SINCE = (1, 14)
"""First version whose servers open a gRPC TLS port by default."""
RUNNING = "==> Consul agent running"
REASON = re.compile(r"(?:==> (?!Consul agent running|Log data|Starting)|\S+ \[(?:ERROR|ERR)\]\s*)(?P<text>.*)")
TLS_NAME = "localhost"
"""Name in every certificate of `tandem certs`; the agent verifies it in its health checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPorts:
    """Ports of an agent, all on loopback."""

    http: int
    dns: int
    server: int
    serf: int

    @classmethod
    def draw(cls) -> AgentPorts:
        """Ports that are free now."""
        http, dns, server, serf = _free_ports(4)
        return cls(http=http, dns=dns, server=server, serf=serf)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """Settings of an agent."""

    name: str = "consul"
    servers: int = 1
    """Number of servers that elect a leader (bootstrap_expect)."""
    is_server: bool = True
    join: tuple[int, ...] = ()
    """Serf ports of the other agents."""
    in_memory: bool = False
    """Dev mode: elects itself at once and keeps no data after it stops; for tests."""
    tls: Tls | None = None
    """Its certificate: it then serves HTTPS, requires client certificates, and presents it in health checks."""
    client: Tls | None = None
    """Client certificate that `access` presents to it."""
    token: str = ""
    """ACL token that `access` presents to it."""
    configuration: tuple[Path, ...] = ()
    """Configuration files that are read first; the settings above override them."""
    more: tuple[tuple[str, Any], ...] = ()
    """Additional configuration, by key."""


class ConsulAgent(ClusterProcess):
    """One Consul agent process."""

    def __init__(self, binary: Path | None, log_directory: Path, spec: AgentSpec | None = None) -> None:
        """Choose ports; no other I/O yet. Its data is in a directory beside its log.

        `binary`: None: the one on PATH, else a copy that is downloaded at the first start.
        """
        self.spec = spec or AgentSpec()
        super().__init__(self.spec.name, "consul", {}, log_directory)
        self.ports = AgentPorts.draw()
        self.data = log_directory / f"{self.spec.name}-data"
        self._binary = binary
        self._configuration = log_directory / f"{self.spec.name}.json"

    @property
    def access(self) -> ConsulAccess:
        """HTTP access to it."""
        tls, scheme = self.spec.client or self.spec.tls, "http" if self.spec.tls is None else "https"
        ca = None if tls is None else tls.ca
        return ConsulAccess(address=f"{scheme}://{HOST}:{self.ports.http}", token=self.spec.token, ca=ca, tls=tls)

    @property
    def dns(self) -> str:
        """host:port of its DNS."""
        return f"{HOST}:{self.ports.dns}"

    async def start(self, run: Path) -> None:
        """Start it with its existing data."""
        if self._binary is None:
            self._binary = await asyncio.to_thread(find_consul)
        version = await asyncio.to_thread(_version, self._binary)
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._configuration.write_text(json.dumps(self._settings(version), indent=2))
        self._configuration.chmod(0o600)
        await super().start(run)

    async def stop(self) -> int | None:
        """Stop it without leaving the Consul cluster, so that it can rejoin. Returns 0 after a clean stop."""
        ran = self.runs
        status = await super().stop()
        # Consul servers that stop without leaving exit with status 1.
        return 0 if ran and status == 1 else status

    def forget(self) -> None:
        """Remove its data, so that the next start begins empty."""
        assert not self.runs, f"{self.name} is still running"
        shutil.rmtree(self.data, ignore_errors=True)

    def clean(self) -> None:
        """Remove its data and configuration."""
        shutil.rmtree(self.data, ignore_errors=True)
        self._configuration.unlink(missing_ok=True)

    async def leader(self) -> str:
        """host:port of the leader as this agent knows it; empty: no leader, or no response."""
        try:
            return str(await self.access.get("/v1/status/leader", timeout_s=1.0) or "")
        except StartError:
            return ""

    async def is_consistent(self) -> bool:
        """Whether there is a leader that has caught up.

        A leader that was just elected responds before it has applied its log: existing keys are missing in its
        responses.
        """
        try:
            await self.access.get("/v1/health/service/consul?consistent", timeout_s=1.0)
        except StartError:
            return False
        return True

    def last_words(self) -> str | None:
        """The last log line that says why it exited, with the error on its continuation lines."""
        lines = self._lines()
        for number in reversed(range(len(lines))):
            reason = REASON.search(lines[number])
            if reason is not None:
                more = [line.strip() for line in lines[number + 1 :] if line.startswith("\t")]
                return " ".join([reason["text"], *more])
        return None

    def _command(self) -> list[str]:
        mode = ["-dev"] if self.spec.in_memory else []
        files = [f"-config-file={file}" for file in (*self.spec.configuration, self._configuration)]
        with_parent_death = [sys.executable, "-m", parent_death.__name__]
        return [*with_parent_death, str(self._binary), "agent", *mode, "-ui", *files]

    async def _serving_at(self) -> str | None:
        """Its address, once it has started and is consistent. Its log is checked too, because another process may
        listen on the port.
        """
        runs = any(line.startswith(RUNNING) for line in self._lines())
        return self.access.url.partition("://")[2] if runs and await self.is_consistent() else None

    def _settings(self, version: tuple[int, ...]) -> dict[str, Any]:
        spec = self.spec
        secure = spec.tls is not None
        ports = {
            "http": -1 if secure else self.ports.http,
            "https": self.ports.http if secure else -1,
            "dns": self.ports.dns,
            "server": self.ports.server,
            "serf_lan": self.ports.serf,
            "serf_wan": -1,
            "grpc": -1,
        }
        if version >= GRPC_TLS_SINCE:
            ports["grpc_tls"] = -1
        settings: dict[str, Any] = {
            "node_name": spec.name,
            "bind_addr": HOST,
            "client_addr": HOST,
            "ports": ports,
            "log_level": LOG_LEVEL,
            "disable_update_check": True,
            "leave_on_terminate": False,
            "performance": {"raft_multiplier": 1},
        }
        if not spec.in_memory:
            settings |= {"data_dir": str(self.data.resolve()), "server": spec.is_server}
            if spec.is_server:
                settings["bootstrap_expect"] = spec.servers
        if spec.join:
            settings |= {"retry_join": [f"{HOST}:{port}" for port in spec.join], "retry_interval": "1s"}
        if spec.tls is not None:
            settings |= {
                "ca_file": str(spec.tls.ca.resolve()),
                "cert_file": str(spec.tls.cert.resolve()),
                "key_file": str(spec.tls.key.resolve()),
                "verify_incoming_https": True,
                "enable_agent_tls_for_checks": True,
                "server_name": TLS_NAME,
            }
        return settings | dict(spec.more)


def _version(binary: Path) -> tuple[int, ...]:
    """Major and minor version.

    Raises:
        StartError: it is not Consul.
    """
    try:
        output = subprocess.run([binary, "version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise StartError(f"{binary} cannot be run: {problem}") from None
    found = re.match(r"Consul v(\d+)\.(\d+)", output)
    if found is None:
        raise StartError(f"{binary} is not Consul: `{binary} version` printed no version")
    return int(found[1]), int(found[2])


def _free_ports(count: int) -> list[int]:
    """Ports on loopback that are free for both TCP and UDP."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise StartError(f"fewer than {count} ports of {PORTS.start} to {PORTS.stop - 1} are free")


def _is_free(port: int) -> bool:
    try:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe:
                probe.bind((HOST, port))
    except OSError:
        return False
    return True
