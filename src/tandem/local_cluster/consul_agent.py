"""A Consul agent of a local cluster: its ports, its configuration, its start and its end.

Listens on loopback only, and keeps its data until it is told to forget them. An agent for development: one server, or
a few that know each other; production has its own (deploy/consul).
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
"""Below those that the OS gives to outgoing connections, so that an agent finds its ports free again."""
LOG_LEVEL = "warn"
GRPC_TLS_SINCE = (1, 14)
"""Servers listen on one more port by default since then."""
RUNNING = "==> Consul agent running"
SAID = re.compile(r"(?:==> (?!Consul agent running|Log data|Starting)|\S+ \[(?:ERROR|ERR)\]\s*)(?P<words>.*)")
TLS_NAME = "localhost"
"""Name that every certificate of `tandem certs` holds; by it the agent knows whom it checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPorts:
    """Where an agent listens."""

    http: int
    dns: int
    server: int
    serf: int

    @classmethod
    def draw(cls) -> AgentPorts:
        """Ports that nobody listens on now."""
        http, dns, server, serf = _free_ports(4)
        return cls(http=http, dns=dns, server=server, serf=serf)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """What an agent is."""

    name: str = "consul"
    servers: int = 1
    """How many servers elect a leader among them."""
    is_server: bool = True
    join: tuple[int, ...] = ()
    """Serf ports of the others."""
    in_memory: bool = False
    """Elects at once and forgets everything at its end; for tests."""
    tls: Tls | None = None
    """Its certificate; it then speaks HTTPS with those who have one too, and shows it to whom it checks."""
    client: Tls | None = None
    """What its own starter shows it."""
    token: str = ""
    """What its own starter shows it."""
    configuration: tuple[Path, ...] = ()
    """Files of configuration that are read first; what stands above counts more."""
    more: tuple[tuple[str, Any], ...] = ()
    """More of its configuration, by key."""


class ConsulAgent(ClusterProcess):
    """One agent."""

    def __init__(self, binary: Path | None, log_directory: Path, spec: AgentSpec | None = None) -> None:
        """Makes no I/O but drawing ports; its data are in a directory beside its log.

        `binary`: None: the one on PATH, or else a copy that is fetched at the first start.
        """
        self.spec = spec or AgentSpec()
        super().__init__(self.spec.name, "consul", {}, log_directory)
        self.ports = AgentPorts.draw()
        self.data = log_directory / f"{self.spec.name}-data"
        self._binary = binary
        self._configuration = log_directory / f"{self.spec.name}.json"

    @property
    def access(self) -> ConsulAccess:
        """How to ask it something."""
        tls, scheme = self.spec.client or self.spec.tls, "http" if self.spec.tls is None else "https"
        ca = None if tls is None else tls.ca
        return ConsulAccess(address=f"{scheme}://{HOST}:{self.ports.http}", token=self.spec.token, ca=ca, tls=tls)

    @property
    def dns(self) -> str:
        """host:port of its DNS."""
        return f"{HOST}:{self.ports.dns}"

    async def start(self, run: Path) -> None:
        """Start it, with the data it has."""
        if self._binary is None:
            self._binary = await asyncio.to_thread(find_consul)
        version = await asyncio.to_thread(_version, self._binary)
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._configuration.write_text(json.dumps(self._settings(version), indent=2))
        self._configuration.chmod(0o600)
        await super().start(run)

    async def stop(self) -> int | None:
        """End it without leaving: it comes back as the one it was. Returns 0 when it ended as it should."""
        ran = self.runs
        status = await super().stop()
        # A server that ends without leaving ends with status 1.
        return 0 if ran and status == 1 else status

    def forget(self) -> None:
        """Remove its data: the next start knows nothing."""
        assert not self.runs, f"{self.name} still runs"
        shutil.rmtree(self.data, ignore_errors=True)

    def clean(self) -> None:
        """Remove its data and configuration, for good."""
        shutil.rmtree(self.data, ignore_errors=True)
        self._configuration.unlink(missing_ok=True)

    async def leader(self) -> str:
        """host:port of the leader's server port as this agent knows it; empty: none, or it does not answer."""
        try:
            return str(await self.access.get("/v1/status/leader", timeout_s=1.0) or "")
        except StartError:
            return ""

    async def answers(self) -> bool:
        """Whether there is a leader that has caught up.

        One that has just been elected answers from before it has read its own data: a key that is there is missing.
        """
        try:
            await self.access.get("/v1/health/service/consul?consistent", timeout_s=1.0)
        except StartError:
            return False
        return True

    def last_words(self) -> str | None:
        """The last line of its log that can say why it ended, with the error that may follow on lines of its own."""
        lines = self._lines()
        for number in reversed(range(len(lines))):
            said = SAID.search(lines[number])
            if said is not None:
                more = [line.strip() for line in lines[number + 1 :] if line.startswith("\t")]
                return " ".join([said["words"], *more])
        return None

    def _command(self) -> list[str]:
        mode = ["-dev"] if self.spec.in_memory else []
        files = [f"-config-file={file}" for file in (*self.spec.configuration, self._configuration)]
        ends_with_us = [sys.executable, "-m", parent_death.__name__]
        return [*ends_with_us, str(self._binary), "agent", *mode, "-ui", *files]

    async def _serving_at(self) -> str | None:
        """Its address, once it is as good as before. Its own word counts: somebody else may answer at that port."""
        runs = any(line.startswith(RUNNING) for line in self._lines())
        return self.access.url.partition("://")[2] if runs and await self.answers() else None

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
        said = subprocess.run([binary, "version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise StartError(f"{binary} cannot be run: {problem}") from None
    found = re.match(r"Consul v(\d+)\.(\d+)", said)
    if found is None:
        raise StartError(f"{binary} is not Consul: it does not tell its version")
    return int(found[1]), int(found[2])


def _free_ports(count: int) -> list[int]:
    """Ports of loopback that are free for TCP and for UDP."""
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
