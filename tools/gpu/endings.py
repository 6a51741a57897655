"""Cancelled streams and killed engines: effects on KV pages, on device memory, and on requests."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from typing import Any

import grpc
import psutil

from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client import calls
from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tools.gpu.callers import Work, prompt, request_of, run
from tools.gpu.measures import Size

SETTLE_S = 1.0
FREE_TIMEOUT_S = 45.0
"""SGLang holds pages into which a dead peer might still write for 30 s."""
RELEASE_S = 10.0
"""A prefill engine releases the memory of a decode engine that has ended within it."""
POLL_S = 0.1


async def kv_tokens(cluster: LocalCluster) -> dict[str, int]:
    """Tokens whose KV pages are held by requests, by worker."""
    loads = {w.name: await calls.worker_load(w.address) for w in cluster.workers if w.runs}
    return {name: load.kv_used_tokens for name, load in loads.items()}


async def until_free(cluster: LocalCluster, tokens_max: int = 0) -> dict[str, Any]:
    """Wait until no worker holds more than a number of tokens; returns the time it took, and the tokens held then."""
    begin_s = time.monotonic()
    while True:
        held = await kv_tokens(cluster)
        after_s = round(time.monotonic() - begin_s, 2)
        if max(held.values(), default=0) <= tokens_max or after_s > FREE_TIMEOUT_S:
            return {"kv_tokens": held, "after_s": after_s}
        await asyncio.sleep(POLL_S)


def device_memory_mib() -> list[int]:
    """Used memory of each GPU, by any process; empty without a GPU."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return []
    return [int(line) for line in said.stdout.split()]


async def cancel(
    cluster: LocalCluster, size: Size, vocabulary_size: int, *, at_token: int, prompt_tokens: int
) -> dict[str, Any]:
    """Close many streams in the middle: at a token, or (0) as soon as they are accepted."""
    before = await kv_tokens(cluster)
    counted = 0
    reached, gate = asyncio.Event(), asyncio.Event()

    async def one(stub: InferenceServiceStub, number: int) -> None:
        nonlocal counted
        ids = prompt(prompt_tokens, vocabulary_size, int(time.monotonic() * 1e6) + number)
        call: Any = stub.Generate(request_of(ids, size.decode_tokens))
        seen = 0
        async for event in call:
            seen += len(event.chunk.token_ids) if event.HasField("chunk") else 0
            if seen >= at_token:
                break
        counted += 1
        if counted == size.decodes:
            reached.set()
        await gate.wait()
        call.cancel()

    async with open_channel(cluster.frontend.address) as channel:
        stub = InferenceServiceStub(channel)
        tasks = [asyncio.create_task(one(stub, number)) for number in range(size.decodes)]
        # A stream that fails before its token must not keep the others.
        await asyncio.wait([asyncio.create_task(reached.wait()), *tasks], return_when=asyncio.FIRST_COMPLETED)
        held = await kv_tokens(cluster)
        gate.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    after = await until_free(cluster)
    return {
        "streams": size.decodes,
        "at_token": at_token,
        "prompt_tokens": prompt_tokens,
        "kv_tokens_before": before,
        "kv_tokens_at_cancel": held,
        "kv_tokens_after": after["kv_tokens"],
        "freed_after_s": after["after_s"],
        "problems": [str(d) for d in done if isinstance(d, Exception)],
        "next_request": await next_request(cluster, vocabulary_size),
    }


async def kill(
    cluster: LocalCluster, size: Size, vocabulary_size: int, role: str, prompt_tokens: int
) -> dict[str, Any]:
    """Kill a worker's scheduler, the process on the GPU, while streams run, and start the worker again."""
    worker = next(w for w in cluster.workers if w.role == role)
    memory = {"before": device_memory_mib()}
    work = Work(
        cluster.frontend.address, size.decodes, size.decodes, prompt_tokens, size.decode_tokens, vocabulary_size,
        int(time.monotonic() * 1e3), timeout_s=60,
    )  # fmt: skip
    running = asyncio.create_task(run(work))
    await asyncio.sleep(SETTLE_S)
    held = await kv_tokens(cluster)
    begin_s = time.monotonic()
    scheduler_of(worker).send_signal(signal.SIGKILL)
    status = await worker.wait_ended()
    ended_s = time.monotonic() - begin_s
    streams = await running
    failed = [s for s in streams if s.failure is not None]
    reported_s = [s.end_s - begin_s for s in failed if s.end_s is not None]
    left = await until_free(cluster)
    memory["just_without_it"] = device_memory_mib()
    await asyncio.sleep(max(0.0, begin_s + RELEASE_S - time.monotonic()))
    memory["without_it"] = device_memory_mib()
    refused = await next_request(cluster, vocabulary_size)
    restart_s = time.monotonic()
    await cluster.restart(worker.name)
    restart_s = time.monotonic() - restart_s
    again = await next_request(cluster, vocabulary_size)
    memory["after_restart"] = device_memory_mib()
    return {
        "killed": worker.name,
        "exit_status": status,
        "worker_ended_after_s": round(ended_s, 2),
        "streams": len(streams),
        "failed": len(failed),
        "finished": len(streams) - len(failed),
        "failed_after_s": round(max(reported_s, default=0.0), 2),
        "sentences": sorted({str(s.failure) for s in failed})[:3],
        "kv_tokens_at_kill": held,
        "kv_tokens_after": left["kv_tokens"],
        "freed_after_s": left["after_s"],
        "without_it": refused,
        "restart_s": round(restart_s, 1),
        "after_restart": again,
        "device_memory_mib": memory,
    }


def scheduler_of(worker: ClusterProcess) -> psutil.Process:
    """The engine's own process: the largest child of the worker's."""
    children = psutil.Process(worker.pid).children()
    return max(children, key=lambda child: child.memory_info().rss)


async def next_request(cluster: LocalCluster, vocabulary_size: int) -> dict[str, Any]:
    begin_s = time.monotonic()
    work = Work(cluster.frontend.address, 1, 1, 48, 8, vocabulary_size, int(begin_s * 1e3), timeout_s=40)
    try:
        (streamed,) = await run(work)
    except grpc.RpcError as failure:
        return {"failure": str(failure)}
    return {"failure": streamed.failure, "tokens": len(streamed.arrivals_s), "s": round(time.monotonic() - begin_s, 2)}
