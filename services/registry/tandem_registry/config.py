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
"""A label of DNS."""


class RegistryConfig(RpcServiceConfig):
    """Keeps the membership of a Tandem cluster: who is alive, in which role, where and in which epoch."""

    backend: str = Field(
        "memory",
        pattern="^(memory|consul)$",
        description="where membership is kept: memory of this process, or Consul, over which any number of registries"
        " tell one view",
    )
    lease_ttl_s: float = Field(5, ge=0.2, le=60, description="a worker without a sign of life for this long is gone")
    consul_address: str = Field(
        "127.0.0.1:8500", description="host:port of a Consul agent, or its URL: https://... for TLS"
    )
    consul_service: str = Field(
        "tandem", pattern=SERVICE_PATTERN, description="name of the one service in Consul; one for each cluster"
    )
    consul_token: SecretStr | None = Field(None, description="token for Consul; better from a file or the environment")
    consul_token_file: Path | None = Field(None, description="file with that token; read again when it is refused")
    consul_ca: Path | None = Field(None, description="CAs (PEM) of the agent's certificate; default: the system's")
    consul_cert: Path | None = Field(None, description="certificate (PEM) that is presented to the agent")
    consul_key: Path | None = Field(None, description="private key of that certificate (PEM)")
    consul_checks: bool = Field(
        True, description="let the agent check the health of members; it must reach them, with TLS too"
    )

    @model_validator(mode="after")
    def _one_token_and_whole_pairs(self) -> Self:
        """Half of a pair would be noticed only when Consul refuses."""
        if self.consul_token is not None and self.consul_token_file is not None:
            raise ConfigError("consul_token_file", "is given beside consul_token: give one of them")
        if "@" in self.consul_address:
            # Before the settings are logged: what stands there may be a password.
            raise ConfigError(
                "consul_address", "must hold no user and no password; Consul takes a token: consul_token_file"
            )
        if (self.consul_cert is None) != (self.consul_key is None):
            missing = "consul_key" if self.consul_key is None else "consul_cert"
            raise ConfigError(missing, "is missing: consul_cert and consul_key are given together or not at all")
        return self
