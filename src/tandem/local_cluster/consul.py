"""The Consul of a local cluster: an agent that the cluster starts, or an existing one.

Owns the registries' Consul settings. A token is passed to them as a file path or in their environment, never on a
command line, which every user of the machine can read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from tandem.local_cluster.consul_agent import AgentSpec, ConsulAgent
from tandem.local_cluster.consul_http import ConsulAccess, read_token_file
from tandem.tls.paths import Tls

TOKEN_VARIABLE = "TANDEM_REGISTRY_CONSUL_TOKEN"  # noqa: S105 the name of a variable
DEFAULT_SERVICE = "tandem"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConsul:
    """How a cluster uses Consul."""

    address: str | None = None
    """host:port or URL of an existing agent; None: the cluster starts one."""
    service: str = DEFAULT_SERVICE
    """Service name of the cluster in Consul."""
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    """CAs that sign the agent's certificate."""
    cert: Path | None = None
    key: Path | None = None
    binary: Path | None = None
    """Binary of the agent that the cluster starts; None: the one on PATH, or a downloaded copy."""

    def with_certificates(self, directory: Path | None) -> ClusterConsul:
        """The same, with the registry's certificate from that directory for an HTTPS agent, unless one is set."""
        if directory is None or not self.is_secure(directory) or self.ca is not None:
            return self
        tls = Tls.in_directory(directory, "registry")
        return replace(self, ca=tls.ca, cert=tls.cert, key=tls.key)

    def is_secure(self, directory: Path | None) -> bool:
        """Whether the agent serves HTTPS."""
        return directory is not None if self.address is None else self.address.startswith("https://")

    def make_agent(self, log_directory: Path, tls: Path | None) -> ConsulAgent | None:
        """The agent that the cluster starts; None: it uses an existing one."""
        if self.address is not None:
            return None
        own = None if tls is None else Tls.in_directory(tls, "consul")
        client = None if tls is None else Tls.in_directory(tls, "registry")
        return ConsulAgent(self.binary, log_directory, AgentSpec(tls=own, client=client))

    def registry_flags(self, agent: ConsulAgent | None, tls: Path | None) -> dict[str, str]:
        """Consul flags of each registry."""
        settings = self.with_certificates(tls)
        files = {"token-file": settings.token_file, "ca": settings.ca, "cert": settings.cert, "key": settings.key}
        return {
            "backend": "consul",
            "consul-address": str(settings.address if agent is None else _short(agent.access.url)),
            "consul-service": settings.service,
            **{f"consul-{name}": str(file) for name, file in files.items() if file is not None},
        }

    def registry_secrets(self) -> dict[str, str]:
        """Environment variables of each registry."""
        return {TOKEN_VARIABLE: self.token} if self.token else {}

    def access(self, tls: Path | None) -> ConsulAccess:
        """HTTP access to the existing agent.

        Raises:
            StartError: the token file cannot be read.
        """
        assert self.address is not None, "for a started agent use ConsulAgent.access"
        settings = self.with_certificates(tls)
        own = None
        if settings.cert is not None and settings.key is not None and settings.ca is not None:
            own = Tls(cert=settings.cert, key=settings.key, ca=settings.ca)
        return ConsulAccess(address=self.address, token=self.read_token(), ca=settings.ca, tls=own)

    def read_token(self) -> str:
        """The token, from its file if there is one; empty: no token.

        Raises:
            StartError: the token file cannot be read.
        """
        return self.token if self.token_file is None else read_token_file(self.token_file)


def _short(url: str) -> str:
    return url.removeprefix("http://")
