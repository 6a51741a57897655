"""Settings of the registry beside those every process has.

Owns names, ranges and defaults.
"""

from __future__ import annotations

from pydantic import Field

from tandem.config import RpcServiceConfig


class RegistryConfig(RpcServiceConfig):
    """Keeps the membership of a Tandem cluster: who is alive, in which role, where and in which epoch."""

    backend: str = Field("memory", pattern="^(memory)$", description="where membership is kept: memory of this process")
    lease_ttl_s: float = Field(5, ge=0.2, le=60, description="a worker without a sign of life for this long is gone")
