"""Measures the demo model through a disaggregated cluster: `python -m tools.demo_model.through_cluster`.

Starts registry, prefill, decode and frontend with the real engine, asks the same kind of questions as `evaluate`, and
counts right answers, tokens per second, KV bytes moved and prompt tokens that decode had to compute itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import psutil
from tokenizers import Tokenizer

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.client import calls
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster

from .facts import recall_prompts

MODEL = Path("models/tandem-demo")
LONGEST_ANSWER_TOKENS = 40
STREAM_TOKENS = 400


async def ask(
    address: str, content: str, max_tokens: int, *, ignore_eos: bool = False
) -> tuple[str, pb.GenerateFinish]:
    """Returns the answer to a message, and the finish of its stream."""
    request = pb.GenerateRequest()
    request.sampling.temperature = 0.0
    request.stopping.max_tokens = max_tokens
    request.stopping.ignore_eos = ignore_eos
    request.chat.messages.add(role="user", content=content)
    text, finish = "", pb.GenerateFinish()
    async for event in calls.generate(address, request):
        text += event.chunk.text
        if event.HasField("finish"):
            finish = event.finish
    return text, finish


async def recall(address: str, seed: int, count: int, concurrent: int) -> dict[str, object]:
    """Returns the share of exactly right answers at 100 to 300 tokens of distance."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = list(
        recall_prompts(seed, count, 100, 300, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))
    )
    gate = asyncio.Semaphore(concurrent)

    async def one(content: str) -> tuple[str, pb.GenerateFinish]:
        async with gate:
            return await ask(address, content, LONGEST_ANSWER_TOKENS)

    answers = await asyncio.gather(*(one(prompt.messages[0]["content"]) for prompt in prompts))
    right = sum(text.strip() == prompt.answer for prompt, (text, _) in zip(prompts, answers, strict=True))
    return {
        "prompts": count, "right": right, "share": round(right / count, 4),
        "prompt_tokens": sum(finish.usage.prompt_tokens for _, finish in answers),
        "kv_bytes_moved": sum(finish.timings.kv_transfer_bytes for _, finish in answers),
        "recomputed_tokens": sum(finish.timings.recomputed_tokens for _, finish in answers),
        "ended_by_itself_share": sum(
            finish.reason == generation_pb2.FINISH_REASON_STOP for _, finish in answers
        ) / count,
    }  # fmt: skip


def cpu_seconds() -> float:
    """Returns the CPU time of the cluster's processes so far. Unlike a clock, it hardly minds other work."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


async def rate(address: str, streams: int) -> dict[str, float]:
    """Returns tokens per second over all streams, and per second of CPU time that all services used together."""
    begin_s, begin_cpu_s = time.monotonic(), cpu_seconds()
    asked = [ask(address, f"Tell me a story about {n}.", STREAM_TOKENS, ignore_eos=True) for n in range(streams)]
    tokens = sum(finish.usage.completion_tokens for _, finish in await asyncio.gather(*asked))
    wall_s, cpu_s = time.monotonic() - begin_s, cpu_seconds() - begin_cpu_s
    return {"tokens_per_s": round(tokens / wall_s), "tokens_per_cpu_s": round(tokens / cpu_s)}


async def measure(arguments: argparse.Namespace) -> None:
    """Prints all measurements, one JSON object a line."""
    with tempfile.TemporaryDirectory(prefix="tandem-recall-") as logs:
        async with LocalCluster(ClusterSpec(model=MODEL, log_directory=Path(logs))) as cluster:
            address = cluster.frontend.address
            await rate(address, 1)
            for streams in (1, 8):
                for _ in range(arguments.repeats):
                    print(json.dumps({"streams": streams, **await rate(address, streams)}), flush=True)
            print(json.dumps(await recall(address, arguments.seed, arguments.prompts, arguments.concurrent)))


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="how often each rate is measured")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
