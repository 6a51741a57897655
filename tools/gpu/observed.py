"""Checks a cluster's observability on GPUs: request traces, KV page accounting, metrics, a worker's profile.

Reads them as an operator does, over the cluster's own APIs. Checks order and sums only; the numbers are recorded for
the reader of the results.
"""

from __future__ import annotations

import asyncio
import collections
import gzip
import itertools
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import leg_pb2
from tandem.client import admin_calls, calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tools.gpu import endings
from tools.gpu.callers import Work, prompt, request_of, run, stream
from tools.gpu.measures import Size
from tools.gpu.summaries import Streamed

NO_COLLECTOR = "http://127.0.0.1:4317"
"""No collector is there: spans and metrics are made, and lost."""
PREFILL_ORDER = ("queued", "bootstrap_end", "prefill_start", "kv_transfer_start", "kv_transfer_end")
DECODE_ORDER = ("queued", "preallocation_end", "kv_transfer_end", "first_token")
REPORTED = ("queued", "bootstrap_end", "preallocation_end", "prefill_start", "prefill_end", "first_token")
MOVED = ("kv_transfer_start", "kv_transfer_end")
AT_ONCE = 8
SETTLED_S = 0.2
"""The frontend notes the end of a request when its stream has ended."""
POLL_S = 0.05
PROFILE_S = 2.0
PROFILE_TIMEOUT_S = 90.0
KERNELS_NAMED = 12
KV_METRICS = ("tandem_kv_", "tandem_prefill_duration", "tandem_engine_queue_wait", "tandem_legs_open")


def with_everything(spec: ClusterSpec) -> ClusterSpec:
    """The same cluster, with metrics, spans and profiles on."""
    flags = {**spec.worker_flags, "admin-enabled": "true"}
    return replace(spec, metrics=True, otlp_endpoint=NO_COLLECTOR, worker_flags=flags)


async def traces(cluster: LocalCluster, size: Size, vocabulary_size: int) -> dict[str, Any]:
    """The steps that each leg reports, for one request at a time and for several at once."""
    rows = [await _trace(cluster, length, vocabulary_size) for length in (1, size.prompt_tokens) for _ in range(3)]
    rows += [await _trace(cluster, size.long_prompt_tokens, vocabulary_size) for _ in range(3)]
    several = [_trace(cluster, size.long_prompt_tokens, vocabulary_size) for _ in range(AT_ONCE)]
    together = list(await asyncio.gather(*several))
    wrong = sorted({problem for row in (*rows, *together) for problem in row["out_of_order"]})
    return {"out_of_order": wrong, "alone": rows, "together": together}


async def _trace(cluster: LocalCluster, prompt_tokens: int, vocabulary_size: int) -> dict[str, Any]:
    request = request_of(prompt(prompt_tokens, vocabulary_size, time.monotonic_ns()), 16)
    request.request_id = f"trace-{time.monotonic_ns()}"
    address = cluster.frontend.address
    async with open_channel(address) as channel:
        streamed = await stream(InferenceServiceStub(channel), request, 60, False)
    await asyncio.sleep(SETTLED_S)
    (timeline,) = await admin_calls.request_timelines(address, request.request_id)
    begin_ns, attempt = timeline.begin.time.ToNanoseconds(), timeline.attempts[-1]
    legs = {"prefill": attempt.prefill.timings, "decode": attempt.decode.timings}
    offsets = {name: offsets_ms(leg, begin_ns) for name, leg in legs.items()}
    wrong = out_of_order(offsets["prefill"], PREFILL_ORDER, "prefill")
    wrong += out_of_order(offsets["decode"], DECODE_ORDER, "decode")
    return {
        "prompt_tokens": prompt_tokens,
        "failure": streamed.failure,
        "ttft_ms": round(1e3 * streamed.ttft_s, 2) if streamed.arrivals_s else None,
        **offsets,
        "kv_transfer_bytes": {name: leg.kv_transfer_bytes for name, leg in legs.items()},
        "recomputed_tokens": legs["decode"].recomputed_tokens,
        "out_of_order": wrong,
    }


def offsets_ms(timings: leg_pb2.LegTimings, begin_ns: int) -> dict[str, float]:
    """Milliseconds since the request came, of each step that is reported."""
    names = [name for name in (*REPORTED, *MOVED) if timings.HasField(f"{name}_time")]  # type: ignore[arg-type]
    return {name: (getattr(timings, f"{name}_time").ToNanoseconds() - begin_ns) / 1e6 for name in names}


def out_of_order(offsets: dict[str, float], order: tuple[str, ...], leg: str) -> list[str]:
    """Steps that are missing, or come after the one that must follow."""
    wrong = [f"{leg}: no {name}" for name in order if name not in offsets]
    present = [name for name in order if name in offsets]
    pairs = itertools.pairwise(present)
    return wrong + [f"{leg}: {one} after {other}" for one, other in pairs if offsets[one] > offsets[other]]


async def pages(cluster: LocalCluster, size: Size, vocabulary_size: int) -> dict[str, Any]:
    """Where KV pages are: at quiet, under load with cancels, and at quiet again."""
    before = await _accounts(cluster)
    seen: dict[str, list[dict[str, int]]] = collections.defaultdict(list)
    watching = asyncio.create_task(_watch(cluster, seen))
    try:
        decoding = await endings.cancel(cluster, size, vocabulary_size, at_token=8, prompt_tokens=size.prompt_tokens)
        prefilling = await endings.cancel(
            cluster, size, vocabulary_size, at_token=0, prompt_tokens=size.long_prompt_tokens
        )
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await asyncio.sleep(endings.SETTLE_S)
    after = await _accounts(cluster)
    return {
        "before": before,
        "after": after,
        "adds_up": {name: missing_tokens(load) == 0 for name, load in after.items()},
        "under_load": {name: _extremes(loads) for name, loads in seen.items()},
        "cancel_decoding": decoding,
        "cancel_prefilling": prefilling,
    }


async def _accounts(cluster: LocalCluster) -> dict[str, dict[str, int]]:
    loads = {w.name: await calls.worker_load(w.address) for w in cluster.workers if w.runs}
    return {
        name: {
            field.name: value
            for field, value in load.ListFields()
            if field.name.startswith("kv_") or field.name in ("transferring_requests", "open_legs")
        }
        for name, load in loads.items()
    }


def missing_tokens(load: dict[str, int]) -> int:
    """Of the capacity, those that are neither used nor cached nor free."""
    counts = (load.get(f"kv_{part}_tokens", 0) for part in ("used", "cached", "free"))
    return load["kv_capacity_tokens"] - sum(counts)


async def _watch(cluster: LocalCluster, seen: dict[str, list[dict[str, int]]]) -> None:
    while True:
        for name, load in (await _accounts(cluster)).items():
            seen[name].append(load)
        await asyncio.sleep(POLL_S)


def _extremes(loads: list[dict[str, int]]) -> dict[str, Any]:
    kinds = sorted({name for load in loads for name in load})
    missing = [missing_tokens(load) for load in loads]
    return {
        "seen": len(loads),
        "greatest": {kind: max(load.get(kind, 0) for load in loads) for kind in kinds},
        "not_adding_up": sum(tokens != 0 for tokens in missing),
        "missing_tokens": [min(missing), max(missing)],
    }


async def metrics(cluster: LocalCluster, size: Size, vocabulary_size: int) -> dict[str, Any]:
    """Change of the workers' metrics over some requests, compared with the usage in the requests' finishes."""
    before = {worker.name: await _scraped(worker.metrics_address) for worker in cluster.workers}
    work = Work(cluster.frontend.address, 16, 4, size.long_prompt_tokens, 16, vocabulary_size, time.monotonic_ns())
    streams: list[Streamed] = await run(work)
    await asyncio.sleep(endings.SETTLE_S)
    after = {worker.name: await _scraped(worker.metrics_address) for worker in cluster.workers}
    moved = {
        name: {key: value - before[name].get(key, 0.0) for key, value in series.items() if "_bucket" not in key}
        for name, series in after.items()
    }
    return {
        "finishes": {
            "requests": len(streams),
            "failed": sum(s.failure is not None for s in streams),
            "bytes": sum(s.moved_bytes or 0 for s in streams),
            "s": sum(s.moving_s or 0.0 for s in streams),
        },
        "moved": {name: {key: value for key, value in found.items() if value} for name, found in moved.items()},
        "now": {name: {k: v for k, v in found.items() if "_pages" in k} for name, found in after.items()},
    }


async def _scraped(address: str | None) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            return str(response.read().decode())

    return dict(_series(await asyncio.to_thread(read)))


def _series(text: str) -> Iterator[tuple[str, float]]:
    for line in text.splitlines():
        if line.startswith(KV_METRICS):
            name, _, value = line.rpartition(" ")
            yield name, float(value)


async def profile(cluster: LocalCluster, size: Size, vocabulary_size: int, out: Path) -> dict[str, Any]:
    """`tandem profile decode-0` while it decodes; what is in the trace, and whether streams went on."""
    work = Work(
        cluster.frontend.address, 4, 4, size.prompt_tokens, size.decode_tokens, vocabulary_size, time.monotonic_ns()
    )
    running = asyncio.create_task(run(work))
    await asyncio.sleep(endings.SETTLE_S)
    begin_s = time.monotonic()
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem.cli", "profile", "decode-0", "--seconds", str(PROFILE_S)),
        *("--address", cluster.registry.address, "--out", str(out)),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(command.communicate(), PROFILE_TIMEOUT_S)
    took_s = round(time.monotonic() - begin_s, 2)
    streams = await running
    return {
        "status": command.returncode,
        "said": said.decode(errors="replace")[-600:],
        "took_s": took_s,
        "streams_failed": [s.failure for s in streams if s.failure],
        "longest_gap_ms": round(1e3 * max(max(s.gaps_s, default=0.0) for s in streams), 1),
        "files": await asyncio.to_thread(all_traced, out),
        "next_request": await endings.next_request(cluster, vocabulary_size),
    }


def all_traced(directory: Path) -> dict[str, dict[str, Any]]:
    """Every trace in a directory."""
    return {file.name: traced(file) for file in sorted(directory.glob("*.trace.json.gz"))}


def traced(file: Path) -> dict[str, Any]:
    """How many events of each kind a trace has, and its most frequent kernels."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    kernels = collections.Counter(event["name"][:80] for event in events if event.get("cat") == "kernel")
    return {
        "size_bytes": file.stat().st_size,
        "kinds": dict(collections.Counter(str(event.get("cat")) for event in events)),
        "kernels": dict(kernels.most_common(KERNELS_NAMED)),
    }
