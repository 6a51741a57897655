"""Chats of several turns over real engines, by routing policy: `python -m benchmarks.cached_chats`.

Two prefill and two decode workers with SGLang on this machine's CPU, and two frontends before them, one for each
policy. Chats of both take turns, each policy under a cache salt of its own, so that neither finds what the other has
left. Prints TTFT and the share of prompt tokens that were found in a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel

MODEL = Path("models") / "tandem-demo"
POLICIES = ("random", "prefix")
TOKEN_IDS = range(10, 1_000)
THINK_S = 0.2
"""Between an answer and the next turn."""


@dataclass
class Figures:
    """Of one policy."""

    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_tokens: int = 0

    def __str__(self) -> str:
        ttft_ms = sorted(1e3 * seconds for seconds in self.ttft_s)
        mean, p50, p90 = statistics.fmean(ttft_ms), statistics.median(ttft_ms), ttft_ms[int(0.9 * (len(ttft_ms) - 1))]
        hits, expected = self.cached_tokens / self.prompt_tokens, self.expected_tokens / self.prompt_tokens
        return (
            f"{len(ttft_ms)} requests   TTFT mean {mean:.0f} ms, p50 {p50:.0f}, p90 {p90:.0f}   "
            f"hit rate {hits:.3f}, expected {expected:.3f}"
        )


async def chat(stub: Any, options: argparse.Namespace, salt: str, seed: int, figures: Figures) -> None:
    """One conversation: each turn's prompt is all that was said before, and some new tokens."""
    draw = random.Random(seed)
    said: list[int] = []
    for _ in range(options.turns):
        said += draw.choices(TOKEN_IDS, k=options.turn_tokens)
        request = pb.GenerateRequest(
            token_ids={"ids": said},
            stopping={"max_tokens": options.answer_tokens, "ignore_eos": True},
            cache_salt=salt,
        )
        begin_s, first_s, prompt_tokens = time.perf_counter(), 0.0, len(said)
        async for event in stub.Generate(request):
            if event.HasField("chunk"):
                first_s = first_s or time.perf_counter() - begin_s
                said += event.chunk.token_ids
            elif event.HasField("finish"):
                figures.cached_tokens += event.finish.usage.cached_tokens
                figures.expected_tokens += event.finish.route.expected_cached_tokens
        figures.ttft_s.append(first_s)
        figures.prompt_tokens += prompt_tokens
        await asyncio.sleep(THINK_S)


async def measure(options: argparse.Namespace, logs: Path) -> dict[str, Figures]:
    """All rounds, the policies in turn."""
    flags = {"dtype": "float32", "engine-extra": json.dumps({"page_size": options.page_size})}
    spec = ClusterSpec(
        model=MODEL, prefill=2, decode=2, frontends=len(POLICIES), log_directory=logs, worker_flags=flags
    )
    cluster = LocalCluster(spec)
    for frontend, policy in zip(cluster.frontends, POLICIES, strict=True):
        frontend.flags["routing-policy"] = policy
    found = {policy: Figures() for policy in POLICIES}
    async with cluster:
        for number in range(options.rounds + 1):
            for frontend, policy in zip(cluster.frontends, POLICIES, strict=True):
                # The first round warms the engines.
                figures = found[policy] if number else Figures()
                async with open_channel(frontend.address) as channel:
                    stub: Any = InferenceServiceStub(channel)
                    seeds = range(1_000 * number, 1_000 * number + options.chats)
                    await asyncio.gather(*(chat(stub, options, policy, seed, figures) for seed in seeds))
                if number:
                    print(f"round {number} {policy:<8}{figures}")
    return found


def main() -> None:
    """Print the figures of both policies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=6, help="conversations at a time")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--turn-tokens", type=int, default=200, help="new tokens of each turn")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page-size", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs:
        for policy, figures in asyncio.run(measure(options, Path(logs))).items():
            print(f"{policy:<16}{figures}")


if __name__ == "__main__":
    main()
