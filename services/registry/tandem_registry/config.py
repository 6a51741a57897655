"""Settings of the registry beside those every process has.

Owns names, ranges and defaults. Which backends exist in this release is the composition root's knowledge.
"""

from __future__ import annotations

from pydantic import Field

from tandem.config import RpcServiceConfig


class RegistryConfig(RpcServiceConfig):
    """Keeps the membership of a Tandem cluster: who is alive, in which role, where and in which epoch."""

    backend: str = Field(
        "memory", pattern="^(memory|consul)$", description="where membership is kept: memory or consul"
    )
    lease_ttl_s: float = Field(5, ge=0.2, le=60, description="a worker without a sign of life for this long is gone")
