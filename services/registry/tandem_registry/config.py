"""Settings of the registry beside those every process has.

Owns names, ranges and defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from tandem.config import RpcServiceConfig
from tandem.errors import ConfigError

SERVICE_PATTERN = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""A DNS label."""


class RegistryConfig(RpcServiceConfig):
    """Membership of a Tandem cluster: which workers and frontends are alive, with role, address and epoch."""

    backend: str = Field(
        "memory",
        pattern="^(memory|consul)$",
        description="where membership is stored: memory (this process, one replica) or consul (any number of replicas"
        " that serve one view)",
    )
    lease_ttl_s: float = Field(5, ge=0.2, le=60, description="a member without a keep-alive for this long expires")
    consul_address: str = Field(
        "127.0.0.1:8500", description="host:port of a Consul agent, or its URL (https://... for TLS)"
    )
    consul_service: str = Field(
        "tandem", pattern=SERVICE_PATTERN, description="service name in Consul; a different one for each cluster"
    )
    consul_token: SecretStr | None = Field(
        None, description="Consul ACL token; prefer consul_token_file or the environment"
    )
    consul_token_file: Path | None = Field(None, description="file with that token; read again when Consul rejects it")
    consul_ca: Path | None = Field(
        None, description="CAs (PEM) that sign the agent's certificate; default: the system's"
    )
    consul_cert: Path | None = Field(None, description="client certificate (PEM) presented to the agent")
    consul_key: Path | None = Field(None, description="private key of that certificate (PEM)")
    consul_checks: bool = Field(
        True, description="the agent checks the health of members; it must be able to reach them, with TLS too"
    )

    @model_validator(mode="after")
    def _one_token_and_whole_pairs(self) -> Self:
        """Checked at start: half of a pair would otherwise fail only at the first call to Consul."""
        if self.consul_token is not None and self.consul_token_file is not None:
            raise ConfigError("consul_token_file", "must not be set together with consul_token")
        if "@" in self.consul_address:
            # Rejected before the settings are logged: the part before the @ may be a password.
            raise ConfigError(
                "consul_address", "must not contain a user or password; authenticate with consul_token_file"
            )
        if (self.consul_cert is None) != (self.consul_key is None):
            missing = "consul_key" if self.consul_key is None else "consul_cert"
            raise ConfigError(missing, "is missing: consul_cert and consul_key must be set together")
        return self
