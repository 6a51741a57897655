"""Settings of the decode worker beside those every worker has."""

from __future__ import annotations

from pydantic import Field

from tandem.domain.worker import WorkerRole
from tandem.worker.config import WorkerConfig


class DecodeConfig(WorkerConfig):
    """Streams tokens from KV it receives, or (aggregated) computes itself: one SGLang engine."""

    role: str = Field(
        "decode",
        pattern="^(decode|aggregated)$",
        description="decode, or aggregated (prefill and decode in one engine)",
    )

    @property
    def worker_role(self) -> WorkerRole:
        """`role` as a WorkerRole."""
        return WorkerRole(self.role)
