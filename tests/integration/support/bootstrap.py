"""Where the bootstrap server of a cluster's prefill engine is."""

from __future__ import annotations

from tandem.client import calls


async def bootstrap_url(registry: str) -> str:
    """Of the first prefill worker that this registry lists."""
    listed = await calls.list_workers(registry)
    address = next(worker.worker.bootstrap for worker in listed if worker.worker.HasField("bootstrap"))
    return f"http://{address.host}:{address.port}"
