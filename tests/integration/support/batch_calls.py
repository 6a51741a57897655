"""Batches as a client of OpenAI's SDK makes them, and clusters that serve them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from openai import AsyncOpenAI
from openai.types import Batch

from tandem.local_cluster.cluster import ClusterSpec
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import DEMO_MODEL
from tests.integration.support.openai_calls import MODEL

ENDED = ("completed", "failed", "expired", "cancelled")
CHAT: Final = "/v1/chat/completions"


def spec(
    directory: Path,
    *,
    engine: dict[str, Any] | None = None,
    frontend: dict[str, str] | None = None,
    worker: dict[str, str] | None = None,
    **more: Any,
) -> ClusterSpec:
    """A simulated cluster of one aggregated worker and an edge, whose frontends share a batch directory."""
    flags = {"edge": more.pop("edge_flags", {}), "frontend": {"batch-directory": str(directory / "batches")}}
    flags["frontend"] |= frontend or {}
    values: dict[str, Any] = {"engine": "simulated", "prefill": 0, "decode": 0, "aggregated": 1, "edge": True}
    values |= {"model": DEMO_MODEL, "log_directory": directory, "role_flags": flags, **more}
    extra = json.dumps({"decode_step_s": 0.002, **(engine or {})})
    return ClusterSpec(worker_flags={"engine-extra": extra, **(worker or {})}, **values)


def sdk(address: str, key: str = "none") -> AsyncOpenAI:
    """OpenAI's SDK, unmodified, at an edge."""
    return AsyncOpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0, timeout=60)


def chat_rows(count: int, max_tokens: int = 4) -> bytes:
    """So many small chat requests."""
    bodies = (
        {"model": MODEL, "messages": [{"role": "user", "content": f"Row {number}"}], "max_tokens": max_tokens}
        for number in range(count)
    )
    return rows(CHAT, *bodies)


def rows(url: str, *bodies: Any) -> bytes:
    """An input whose rows are named row-0, row-1, …"""
    lines = (
        {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": body} for number, body in enumerate(bodies)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def created(client: AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **changes: Any) -> Batch:
    """A batch of an upload."""
    file = await client.files.create(file=("rows.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **changes)


async def until(client: AsyncOpenAI, batch: Batch, accept: Callable[[Batch], bool], within_s: float = 60) -> Batch:
    """Wait until a batch is as the test wants it."""
    return await assert_eventually(
        lambda: client.batches.retrieve(batch.id), accept, within_s=within_s, every_s=0.1, what="the batch's state"
    )


async def ended(client: AsyncOpenAI, batch: Batch, within_s: float = 60) -> Batch:
    """Wait for the end of a batch."""
    return await until(client, batch, lambda batch: batch.status in ENDED, within_s)


async def results(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """Lines of a result file; none without a file."""
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(line) for line in content.text.splitlines()]


async def assert_each_row_once(client: AsyncOpenAI, batch: Batch, count: int) -> None:
    """A completed batch has each row once in its output, with a response, and no error file."""
    assert (batch.status, batch.error_file_id) == ("completed", None), batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed) == (count, count)
    lines = await results(client, batch.output_file_id)
    found = Counter(line["custom_id"] for line in lines)
    assert found == Counter(f"row-{number}" for number in range(count))
    assert all(line["response"]["body"]["choices"] for line in lines)
