"""Cost of TLS: `python -m benchmarks.tls`.

Starts two clusters of simulated engines on one machine, one in plaintext and one with certificates, and sends requests
to both in turn, so that other load on the machine affects both. TTFT is measured at the client, one request at a time;
throughput with many concurrent streams whose tokens come as fast as the services can forward them, together with the
CPU time of all services per token, which a busy machine affects least. Prints medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import psutil

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.tls.authority import issue_all
from tandem.tls.paths import client_tls

MODEL = Path("models") / "tandem-demo"
FAST = {"engine-extra": json.dumps({"decode_step_s": 1e-6})}


async def ask(stub, max_tokens: int) -> float:
    """Returns the time to the first token."""
    request = pb.GenerateRequest(sampling={"temperature": 0.0}, stopping={"max_tokens": max_tokens, "ignore_eos": True})
    request.token_ids.ids.extend(range(6, 134))
    begin_s = time.perf_counter()
    ttft_s = None
    async for event in stub.Generate(request):
        if ttft_s is None and event.HasField("chunk"):
            ttft_s = time.perf_counter() - begin_s
    return ttft_s


async def tokens_per_s(stub, streams: int, max_tokens: int) -> float:
    begin_s = time.perf_counter()
    await asyncio.gather(*(ask(stub, max_tokens) for _ in range(streams)))
    return streams * max_tokens / (time.perf_counter() - begin_s)


def processor_s(cluster: LocalCluster) -> float:
    times = [psutil.Process(process.pid).cpu_times() for process in cluster.processes]
    return sum(time.user + time.system for time in times)


async def connect_s(address: str, tls) -> float:
    """Returns the time to open a connection, handshake included."""
    begin_s = time.perf_counter()
    async with open_channel(address, tls) as channel:
        await channel.channel_ready()
        return time.perf_counter() - begin_s


async def measure(arguments: argparse.Namespace) -> dict:
    work = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    issue_all(work / "certs")
    ttft_ms, rate, cost_us, connect_ms = ({"plaintext": [], "tls": []} for _ in range(4))
    async with AsyncExitStack() as stack:
        sides = {}
        for side, certs in (("plaintext", None), ("tls", work / "certs")):
            spec = ClusterSpec(model=MODEL, log_directory=work / side, engine="simulated", worker_flags=FAST, tls=certs)
            cluster = await stack.enter_async_context(LocalCluster(spec))
            tls = client_tls(certs)
            channel = await stack.enter_async_context(open_channel(cluster.frontend.address, tls))
            sides[side] = InferenceServiceStub(channel), cluster, tls
        for stub, _, _ in sides.values():
            await asyncio.gather(*(ask(stub, 20) for _ in range(arguments.warm)))
        for _ in range(arguments.requests):
            for side, (stub, cluster, tls) in sides.items():
                ttft_ms[side].append(1e3 * await ask(stub, 4))
                connect_ms[side].append(1e3 * await connect_s(cluster.frontend.address, tls))
        for _ in range(arguments.rounds):
            for side, (stub, cluster, _) in sides.items():
                before_s = processor_s(cluster)
                rate[side].append(await tokens_per_s(stub, arguments.streams, arguments.max_tokens))
                spent_s = processor_s(cluster) - before_s
                cost_us[side].append(1e6 * spent_s / (arguments.streams * arguments.max_tokens))
    return {
        name: {side: round(statistics.median(values), digits) for side, values in measured.items()}
        for name, measured, digits in (
            ("ttft_ms", ttft_ms, 2),
            ("tokens_per_s", rate, 0),
            ("processor_us_per_token", cost_us, 1),
            ("connect_ms", connect_ms, 2),
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=500)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
