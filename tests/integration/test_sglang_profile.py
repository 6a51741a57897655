"""A profile of the real engine: asked for over gRPC, recorded by SGLang while it serves, and full of its operations."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path

import pytest

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.client import admin_calls
from tandem.errors import NotSupported
from tests.integration.conftest import running
from tests.integration.support.calls import generate, request_of

STEPS = 24

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300), pytest.mark.engine_sglang]


async def captured(address: str, **fields: int) -> dict[str, bytes]:
    request = pb.CaptureProfileRequest(**fields)  # type: ignore[arg-type]
    return {name: data async for name, data in admin_calls.capture_profile(address, request)}


def operations(trace: bytes) -> dict[str, int]:
    """Names of the operations of a trace, and how often each one ran."""
    counts: dict[str, int] = {}
    for event in json.loads(gzip.decompress(trace))["traceEvents"]:
        if event.get("cat") == "cpu_op":
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    return counts


async def test_a_trace_has_the_operations_of_steps(tmp_path: Path) -> None:
    flags = {"dtype": "float32", "admin-enabled": "true"}
    async with running(tmp_path, prefill=0, decode=0, aggregated=1, worker_flags=flags) as cluster:
        worker = cluster.process("aggregated-0").address
        request = request_of("Once upon a time", max_tokens=STEPS, ignore_eos=True)
        recording = asyncio.create_task(captured(worker, duration_ms=5_000))
        await asyncio.sleep(0.5)
        text = (await generate(cluster, request)).text
        files = await recording
        (name,) = files
        assert name.endswith("TP-0.trace.json.gz")
        passes = operations(files[name])["aten::linear"]
        assert passes >= STEPS, "a forward pass for each token"
        # The engine is as it was, and can be asked again; a recording also ends when its steps are done.
        recording = asyncio.create_task(captured(worker, duration_ms=5_000, steps_max=5))
        await asyncio.sleep(0.5)
        assert (await generate(cluster, request)).text == text
        fewer = operations(next(iter((await recording).values())))
        assert 0 < fewer["aten::linear"] < passes / 2
        with pytest.raises(NotSupported, match="chrome_trace"):
            await captured(worker, format=pb.PROFILE_FORMAT_HTML)
