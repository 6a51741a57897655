"""Effect of long prompts on running streams: `python -m benchmarks.long_prompts`, and the same with `--cluster`.

In one process: a 10 ms ticker stands in for the streams, while prompts of 100,000 tokens arrive one after another, are
validated, tokenized and serialized as two leg requests. With the frontend's process for long prompts, with a thread
instead, as a chat, and as token ids. With `--cluster`: 16 paced streams of a simulated cluster, while a client in its
own process sends such prompts to the same frontend.

Intervals with and without long prompts alternate, because the machine is shared; the results cover all intervals of a
kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.preparation.validation import checked_generate

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import leg_pb2
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.fake_model import write_fake_model

DEMO = Path("models") / "tandem-demo" / "tokenizer.json"
CONTEXT_TOKENS = 2**17
TICK_S = 0.01
GOAL = 1.2
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"


@dataclass
class Gaps:
    """Seconds between two ticks, or two tokens of a stream."""

    seconds: list[float] = field(default_factory=list)
    prompts: int = 0

    def ms(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def __str__(self) -> str:
        times = "  ".join(f"{name} {self.ms(share):6.2f}" for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1)))
        return f"{times} ms   {len(self.seconds):6} gaps {self.prompts:5} prompts"


def show(found: dict[str, Gaps]) -> None:
    alone = found["alone"].ms(0.99)
    for name, gaps in found.items():
        growth = gaps.ms(0.99) / alone
        verdict = "" if name == "alone" else f"   p99 x {growth:.2f}, {'within' if growth <= GOAL else 'beyond'} {GOAL}"
        print(f"{name:<28}{gaps}{verdict}")


def model_of(tokenizer: Path, directory: Path) -> Path:
    """A directory with a real tokenizer, a context of 131,072 tokens and weights of four bytes."""
    vocabulary = tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab()
    model = write_fake_model(directory, max_position_embeddings=CONTEXT_TOKENS, vocab_size=1 + max(vocabulary.values()))
    shutil.copy(tokenizer, model / "tokenizer.json")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return model


def prompts_of(tokenizer: Path, count: int, tokens: int) -> list[str]:
    """Different texts of about so many tokens: words of the repository's own pages."""
    words = [word for page in Path("docs").rglob("*.md") for word in page.read_text().split()]
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    ratio = len(backend.encode_batch_fast([" ".join(words)])[0]) / len(words)
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=int(tokens / ratio))) for _ in range(count)]


@contextlib.asynccontextmanager
async def ticking(gaps: list[float]) -> AsyncIterator[None]:
    async def tick() -> None:
        last_s = time.perf_counter()
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.perf_counter()
            gaps.append(now_s - last_s)
            last_s = now_s

    task = asyncio.create_task(tick())
    yield
    task.cancel()


async def take(request: bytes, tokenizer: Tokenizer) -> None:
    """What a frontend's loop does with a prompt until its legs are on their way."""
    wanted = await checked_generate(pb.GenerateRequest.FromString(request), tokenizer)
    leg = leg_pb2.LegRequest(request_id=wanted.request_id, token_ids=wanted.token_ids)
    for attempt in (1, 2):
        addressed = leg_pb2.LegRequest()
        addressed.CopyFrom(leg)
        addressed.attempt = attempt
        addressed.SerializeToString()
        await asyncio.sleep(0)


async def in_one_process(options: argparse.Namespace, model: Path, texts: list[str]) -> dict[str, Gaps]:
    by_process, by_thread = Tokenizer.open(model, processes=1), Tokenizer.open(model)
    ids = [list(await by_process.encode(text, add_special_tokens=False)) for text in texts]
    print(f"prompts of {min(map(len, ids)):,} to {max(map(len, ids)):,} tokens")
    prompts = [pb.GenerateRequest(prompt=text).SerializeToString() for text in texts]
    chats = [pb.GenerateRequest(chat={"messages": [{"role": "user", "content": text}]}).SerializeToString()
             for text in texts]  # fmt: skip
    given = [pb.GenerateRequest(token_ids={"ids": one}).SerializeToString() for one in ids]
    kinds = {
        "alone": ([], by_process),
        "prompt, process": (prompts, by_process),
        "prompt, thread": (prompts, by_thread),
        "chat, process": (chats, by_process),
        "token ids": (given, by_process),
    }
    found = {name: Gaps() for name in kinds}
    for _ in range(options.rounds):
        for name, (requests, tokenizer) in kinds.items():
            async with ticking(found[name].seconds):
                end_s = time.perf_counter() + options.moment_s
                while requests and time.perf_counter() < end_s:
                    await take(requests[found[name].prompts % len(requests)], tokenizer)
                    found[name].prompts += 1
                    # A prompt that need not be encoded would come again at once, and be all that the loop does.
                    await asyncio.sleep(options.pause_s)
                await asyncio.sleep(max(0.0, end_s - time.perf_counter()))
    await by_process.close()
    return found


async def stream(stub: Any, tokens: int, take_gap: Callable[[float], None]) -> None:
    """One paced stream, until it is cancelled."""
    request = pb.GenerateRequest(prompt="Tell me a story.", stopping={"max_tokens": tokens, "ignore_eos": True})
    last_s = None
    async for event in stub.Generate(request):
        now_s = time.perf_counter()
        if event.HasField("chunk") and last_s is not None:
            take_gap(now_s - last_s)
        last_s = now_s if event.HasField("chunk") else last_s


async def send(options: argparse.Namespace) -> None:
    """The other client: reads on its standard input for how many seconds to send, and answers how many it sent."""
    requests = [pb.GenerateRequest(prompt=text, stopping={"max_tokens": 1}) for text in
                prompts_of(options.tokenizer, 8, options.tokens)]  # fmt: skip
    async with open_channel(options.send_to) as channel:
        stub: Any = InferenceServiceStub(channel)
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            sent, end_s = 0, time.perf_counter() + float(line)
            while time.perf_counter() < end_s:
                request = requests[sent % len(requests)]
                if options.call == "tokenize":
                    await stub.Tokenize(pb.TokenizeRequest(prompt=request.prompt))
                else:
                    await stub.GenerateUnary(pb.GenerateUnaryRequest(generate=request))
                sent += 1
            print(sent, flush=True)


@contextlib.asynccontextmanager
async def sender(options: argparse.Namespace, address: str) -> AsyncIterator[Callable[[float], Awaitable[int]]]:
    flags = [f"--send-to={address}", f"--call={options.call}", f"--tokenizer={options.tokenizer}",
             f"--tokens={options.tokens}"]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.long_prompts", *flags, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdout.readline()

    async def ask(seconds: float) -> int:
        process.stdin.write(f"{seconds}\n".encode())
        return int(await process.stdout.readline())

    yield ask
    process.stdin.close()
    await process.wait()


async def through_a_cluster(options: argparse.Namespace, model: Path, logs: Path) -> dict[str, Gaps]:
    engine = {"decode_step_s": TICK_S, "prefill_tokens_per_s": 1e9}
    flags = {"engine-extra": json.dumps(engine), "kv-capacity-tokens": str(32 * CONTEXT_TOKENS),
             "running-requests-max": "64"}  # fmt: skip
    frontend = {"frontend": {"long-prompt-processes": str(options.processes)}}
    spec = ClusterSpec(model=model, engine="simulated", log_directory=logs, worker_flags=flags, role_flags=frontend,
                       frontends=1 + options.apart)  # fmt: skip
    found = {"alone": Gaps(), "beside": Gaps()}
    now: list[list[float]] = [[]]
    async with LocalCluster(spec) as cluster, open_channel(cluster.frontend.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        streams = [asyncio.create_task(stream(stub, 100_000, lambda gap_s: now[0].append(gap_s)))
                   for _ in range(options.streams)]  # fmt: skip
        async with sender(options, cluster.frontends[-1].address) as ask:
            await ask(2.0)
            for _ in range(options.rounds):
                now[0] = found["alone"].seconds
                await asyncio.sleep(options.moment_s)
                now[0] = found["beside"].seconds
                found["beside"].prompts += await ask(options.moment_s)
                now[0] = []
                await asyncio.sleep(0.5)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return found


async def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
        model = model_of(options.tokenizer, Path(directory) / "model")
        if options.cluster:
            show(await through_a_cluster(options, model, Path(directory) / "logs"))
        else:
            show(await in_one_process(options, model, prompts_of(options.tokenizer, 4, options.tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", action="store_true", help="through a simulated cluster")
    parser.add_argument("--call", choices=("generate", "tokenize"), default="generate",
                        help="with --cluster; tokenize: does not use the workers, which share the cores")  # fmt: skip
    parser.add_argument("--apart", action="store_true",
                        help="with --cluster: send prompts to another frontend (effect of shared cores)")  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, help="with --cluster: tokenizer processes; 0: tokenize in a thread"
    )
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--moment-s", type=float, default=2.0, help="seconds of each kind in each round")
    parser.add_argument("--pause-s", type=float, default=0.05, help="seconds between two prompts, without --cluster")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--tokenizer", type=Path, default=DEMO, help="a tokenizer.json")
    parser.add_argument("--send-to", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asyncio.run(send(options) if options.send_to else measure(options))


if __name__ == "__main__":
    main()
