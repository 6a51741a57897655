"""Which Consul a local cluster keeps its membership in: an agent of its own, or one that runs already.

Owns what the registries are told of it. A token goes to them as a file's path or in their environment, never on a
command line, which everybody on the machine can read.
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
    """A cluster's Consul."""

    address: str | None = None
    """host:port or URL of an agent that runs already; None: the cluster starts one."""
    service: str = DEFAULT_SERVICE
    """Name of the cluster in Consul."""
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    """CAs of the agent's certificate."""
    cert: Path | None = None
    key: Path | None = None
    binary: Path | None = None
    """Of an agent of its own; None: the one on PATH, or a fetched copy."""

    def with_certificates(self, directory: Path | None) -> ClusterConsul:
        """What registries of a cluster with these certificates show an agent that asks for some."""
        if directory is None or not self.is_secure(directory) or self.ca is not None:
            return self
        tls = Tls.in_directory(directory, "registry")
        return replace(self, ca=tls.ca, cert=tls.cert, key=tls.key)

    def is_secure(self, directory: Path | None) -> bool:
        """Whether it is spoken to by HTTPS."""
        return directory is not None if self.address is None else self.address.startswith("https://")

    def make_agent(self, log_directory: Path, tls: Path | None) -> ConsulAgent | None:
        """An agent of its own; None: one runs already."""
        if self.address is not None:
            return None
        own = None if tls is None else Tls.in_directory(tls, "consul")
        client = None if tls is None else Tls.in_directory(tls, "registry")
        return ConsulAgent(self.binary, log_directory, AgentSpec(tls=own, client=client))

    def registry_flags(self, agent: ConsulAgent | None, tls: Path | None) -> dict[str, str]:
        """Settings of each registry."""
        told = self.with_certificates(tls)
        files = {"token-file": told.token_file, "ca": told.ca, "cert": told.cert, "key": told.key}
        return {
            "backend": "consul",
            "consul-address": str(told.address if agent is None else _short(agent.access.url)),
            "consul-service": told.service,
            **{f"consul-{name}": str(file) for name, file in files.items() if file is not None},
        }

    def registry_secrets(self) -> dict[str, str]:
        """Variables of each registry."""
        return {TOKEN_VARIABLE: self.token} if self.token else {}

    def access(self, tls: Path | None) -> ConsulAccess:
        """How to ask the agent that runs already.

        Raises:
            StartError: the file of the token cannot be read.
        """
        assert self.address is not None, "an agent of its own says how to ask it"
        told = self.with_certificates(tls)
        own = None
        if told.cert is not None and told.key is not None and told.ca is not None:
            own = Tls(cert=told.cert, key=told.key, ca=told.ca)
        return ConsulAccess(address=self.address, token=self.read_token(), ca=told.ca, tls=own)

    def read_token(self) -> str:
        """The token itself; empty: there is none.

        Raises:
            StartError: its file cannot be read.
        """
        return self.token if self.token_file is None else read_token_file(self.token_file)


def _short(url: str) -> str:
    return url.removeprefix("http://")
