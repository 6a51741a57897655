"""Chats of several turns by two routing policies, in turn on one fleet: `prefix` against `random`.

The chats and their figures are those of benchmarks/cached_chats.py, with one frontend for each policy.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable
from typing import Any

from benchmarks.cached_chats import POLICIES, Figures, chat
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tools.gpu.summaries import spread_ms

PAGE_SIZE_TOKENS = 16
"""Smaller pages have no KV events by default, which `prefix` follows."""
GPU = argparse.Namespace(chats=32, turns=6, turn_tokens=1000, answer_tokens=64, rounds=2)
REHEARSAL = argparse.Namespace(chats=4, turns=4, turn_tokens=150, answer_tokens=8, rounds=1)


def prepare(cluster: LocalCluster) -> None:
    """Give each policy its frontend; before the cluster starts."""
    for frontend, policy in zip(cluster.frontends, POLICIES, strict=True):
        frontend.flags["routing-policy"] = policy


async def compare(cluster: LocalCluster, work: argparse.Namespace) -> dict[str, Any]:
    """All rounds, the policies in turn; a first one that is not counted warms the engines."""
    found = {policy: Figures() for policy in POLICIES}
    for number in range(work.rounds + 1):
        for frontend, policy in zip(cluster.frontends, POLICIES, strict=True):
            figures = found[policy] if number else Figures()
            async with open_channel(frontend.address) as channel:
                stub: Any = InferenceServiceStub(channel)
                seeds: Iterable[int] = range(1_000 * number, 1_000 * number + work.chats)
                await asyncio.gather(*(chat(stub, work, f"{policy}-{number}", seed, figures) for seed in seeds))
    return {"work": vars(work), **{policy: summary(figures) for policy, figures in found.items()}}


def summary(figures: Figures) -> dict[str, Any]:
    """The figures of one policy."""
    return {
        "requests": len(figures.ttft_s),
        "ttft_ms": spread_ms(figures.ttft_s),
        "hit_rate": round(figures.cached_tokens / figures.prompt_tokens, 4),
        "expected_hit_rate": round(figures.expected_tokens / figures.prompt_tokens, 4),
    }
