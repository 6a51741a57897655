"""Overhead of Tandem over a bare pair of engines: `python -m benchmarks.pair_overhead`.

Starts a Tandem cluster (registry, prefill, decode, frontend) and a pair of bare sglang.Engine with the same settings,
and sends the same prompts to both in turn, one at a time. TTFT is measured at the client, from the call to the first
token. Prints medians and their differences.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bare_engine import LINE_BYTES_MAX
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel

MODEL = Path("models") / "tandem-demo"
START_TIMEOUT_S = 400
"""The first start on a GPU machine compiles kernels."""
ON_A_CPU = {"dtype": "float32", "device": "cpu"}


@dataclass
class Measured:
    """One request as its client saw it."""

    ttft_s: float
    tokens_per_s: float

    @classmethod
    def of(cls, begin_s: float, times_s: list[float]) -> Measured:
        return cls(times_s[0] - begin_s, (len(times_s) - 1) / (times_s[-1] - times_s[0]))


class BareEngine:
    """A process of benchmarks.bare_engine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(
        cls, role: str, model: Path = MODEL, settings: dict | None = None, log: Path | None = None
    ) -> BareEngine:
        """Return when there is a process; its first line says that it serves. What it logs is lost without a `log`."""
        with contextlib.ExitStack() as files:
            errors = asyncio.subprocess.DEVNULL
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                errors = files.enter_context(log.open("wb"))
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "benchmarks.bare_engine", role, str(model), json.dumps(settings or ON_A_CPU),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, limit=LINE_BYTES_MAX,
            )  # fmt: skip
        return cls(process)

    async def read(self) -> dict:
        """The next line it says."""
        line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        if not line:
            raise RuntimeError("a bare engine process exited; see its log")
        return json.loads(line)

    def send(self, work: dict | list[dict]) -> None:
        """One request, or several that begin at once and are answered by one line."""
        self._process.stdin.write(json.dumps(work).encode() + b"\n")

    async def stop(self) -> None:
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def ask_bare(
    prefill: BareEngine, decode: BareEngine, where: dict, token_ids: list[int], max_tokens: int, rid: str
):
    work = {"rid": rid, "token_ids": token_ids, "max_tokens": max_tokens, "room": random.getrandbits(62) + 1, **where}
    begin_s = time.monotonic()
    decode.send(work)
    prefill.send(work)
    answer, _ = await asyncio.gather(decode.read(), prefill.read())
    return Measured.of(begin_s, answer["times_s"])


async def ask_tandem(stub, token_ids: list[int], max_tokens: int) -> Measured:
    request = pb.GenerateRequest(sampling={"temperature": 0.0}, stopping={"max_tokens": max_tokens, "ignore_eos": True})
    request.token_ids.ids.extend(token_ids)
    begin_s = time.monotonic()
    times_s: list[float] = []
    async for event in stub.Generate(request):
        if event.HasField("chunk"):
            times_s += [time.monotonic()] * len(event.chunk.token_ids)
    return Measured.of(begin_s, times_s)


async def measure(arguments: argparse.Namespace) -> None:
    prefill, decode = await asyncio.gather(BareEngine.start("prefill"), BareEngine.start("decode"))
    try:
        where, _ = await asyncio.gather(prefill.read(), decode.read())
        print("the bare pair is up", file=sys.stderr, flush=True)
        logs = Path(tempfile.mkdtemp(prefix="tandem-bench-"))
        spec = ClusterSpec(model=MODEL, log_directory=logs, worker_flags=ON_A_CPU)
        async with LocalCluster(spec) as cluster, open_channel(cluster.frontend.address) as channel:
            print("the cluster is up", file=sys.stderr, flush=True)
            stub = InferenceServiceStub(channel)
            draw = random.Random(1)
            bare: list[Measured] = []
            tandem: list[Measured] = []
            for number in range(arguments.warm + arguments.requests):
                # Fresh prompts: neither side answers from its prefix cache.
                prompts = [[draw.randrange(6, 1536) for _ in range(arguments.prompt_tokens)] for _ in range(2)]
                one = await ask_bare(prefill, decode, where, prompts[0], arguments.max_tokens, f"bare-{number:06d}")
                other = await ask_tandem(stub, prompts[1], arguments.max_tokens)
                if number >= arguments.warm:
                    bare.append(one)
                    tandem.append(other)
    finally:
        await asyncio.gather(prefill.stop(), decode.stop())
    report(bare, tandem)


def report(bare: list[Measured], tandem: list[Measured]) -> None:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    ttft_ms = [1e3 * median([m.ttft_s for m in side]) for side in (bare, tandem)]
    rate = [median([m.tokens_per_s for m in side]) for side in (bare, tandem)]
    result = {
        "requests": len(bare),
        "ttft_ms": {
            "bare": round(ttft_ms[0], 2),
            "tandem": round(ttft_ms[1], 2),
            "more": round(ttft_ms[1] - ttft_ms[0], 2),
        },
        "tokens_per_s": {
            "bare": round(rate[0], 1),
            "tandem": round(rate[1], 1),
            "less_percent": round(100 * (1 - rate[1] / rate[0]), 2),
        },
    }
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=200)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
