"""Overhead of HTTP over native gRPC: `python -m benchmarks.http_overhead`.

Starts one cluster behind a real Envoy, on simulated engines so that the engine costs little, and streams the same chat
through both APIs in turn: `Generate` over gRPC, and OpenAI's chat completions over HTTP. Prints, for each, the time to
the first token and the CPU time that frontend and edge together use per streamed message.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel

MODEL = Path("models") / "tandem-demo"
CONTENT = "Where did Mia hide the red key?"


@dataclass
class Door:
    """What one door has cost so far."""

    ttft_s: list[float]
    frontend_s: float = 0.0
    edge_s: float = 0.0
    messages: int = 0

    @property
    def processor_s(self) -> float:
        """Of both."""
        return self.frontend_s + self.edge_s


def processor_s(pids: list[int]) -> float:
    total_s = 0.0
    for pid in pids:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


async def native(stub: Any, max_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and messages."""
    request = pb.GenerateRequest(stopping={"max_tokens": max_tokens, "ignore_eos": True})
    request.chat.messages.add(role="user", content=CONTENT)
    begin_s, first_s, messages = time.perf_counter(), 0.0, 0
    async for event in stub.Generate(request):
        if event.HasField("chunk"):
            first_s = first_s or time.perf_counter()
            messages += 1
    return first_s - begin_s, messages


async def over_http(client: httpx.AsyncClient, max_tokens: int) -> tuple[float, int]:
    """The same over HTTP."""
    body = {
        "model": MODEL.name,
        "messages": [{"role": "user", "content": CONTENT}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    begin_s, first_s, messages = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            # The first event only says who speaks; the first token comes with the second, at once.
            if '"content":"' in line and '"role"' not in line:
                first_s = first_s or time.perf_counter()
                messages += 1
    return first_s - begin_s, messages


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    flags = {"engine-extra": json.dumps({"decode_step_s": arguments.step_s})}
    logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
    spec = ClusterSpec(model=MODEL, engine="simulated", edge=True, log_directory=logs, worker_flags=flags)
    doors = {"grpc": Door([]), "http": Door([])}
    async with LocalCluster(spec) as cluster, open_channel(cluster.frontend.address) as channel:
        assert cluster.edge is not None
        pids = [[cluster.frontend.pid], [cluster.edge.pid]]
        async with httpx.AsyncClient(base_url=f"http://{cluster.edge.address}", timeout=60) as client:
            stub = InferenceServiceStub(channel)
            for number in range(arguments.warm + arguments.rounds):
                for name, ask in (("grpc", lambda: native(stub, arguments.max_tokens)),
                                  ("http", lambda: over_http(client, arguments.max_tokens))):  # fmt: skip
                    before_s = [processor_s(one) for one in pids]
                    streams = await asyncio.gather(*(ask() for _ in range(arguments.streams)))
                    spent_s = [processor_s(one) - was_s for one, was_s in zip(pids, before_s, strict=True)]
                    if number >= arguments.warm:
                        doors[name].ttft_s += [ttft_s for ttft_s, _ in streams]
                        doors[name].frontend_s += spent_s[0]
                        doors[name].edge_s += spent_s[1]
                        doors[name].messages += sum(messages for _, messages in streams)
    return report(doors)


def report(doors: dict[str, Door]) -> dict[str, Any]:
    ttft_ms = {name: 1e3 * statistics.median(door.ttft_s) for name, door in doors.items()}
    cost_us = {name: 1e6 * door.processor_s / door.messages for name, door in doors.items()}
    return {
        "streams": len(doors["grpc"].ttft_s),
        "messages": doors["http"].messages,
        "ttft_ms_median": {**{n: round(v, 2) for n, v in ttft_ms.items()},
                           "more": round(ttft_ms["http"] - ttft_ms["grpc"], 2)},
        "processor_us_per_message": {**{n: round(v, 1) for n, v in cost_us.items()},
                                     "more": round(cost_us["http"] - cost_us["grpc"], 1),
                                     "edge_alone": round(1e6 * doors["http"].edge_s / doors["http"].messages, 1)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--step-s", type=float, default=0.005, help="time between tokens of a stream")
    parser.add_argument("--max-tokens", type=int, default=200)
    print(json.dumps(asyncio.run(measure(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
