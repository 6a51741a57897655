"""Fit the simulated engine's timing to a real engine: `python tools/fit_simulated_engine.py models/tandem-demo`.

Runs SGLang over a grid of prompt lengths and batch sizes, fits the timing model by least squares of the relative
errors, prints the residuals, checks the fit on requests outside the grid, and writes a profile that
`--engine-extra '{"profile": ...}'` loads. With --pair, also measures the KV transfer bandwidth of a cluster of two
engines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.api.types.v1 import sampling_pb2
from tandem.domain.checkpoint import read_checkpoint
from tandem.domain.generation import EngineRequest, Sampling, Stopping
from tandem.domain.worker import Capabilities, WorkerRole
from tandem.engine import pulling
from tandem.engine.factory import create_engine
from tandem.engine.port import Engine
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.engine import SimulatedEngine
from tandem.engine.simulated.network import MemoryNetwork
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tandem.rpc.channels import open_channel
from tandem.testing.virtual_time import LoopClock, run_virtually

PROMPTS = (16, 64, 128, 256, 512, 1024, 1536)
BATCHES = (1, 2, 4, 8)
CONTEXTS = (32, 256, 1024)
TRANSFERS = (64, 256, 512, 1024, 1536)
Batch = tuple[int, int, int]
CHECKS: tuple[Batch, ...] = ((1, 400, 40), (3, 700, 30), (6, 100, 50))
"""Requests at once, prompt tokens, new tokens: none of them in the grid."""
SHORT_TOKENS = 8
DECODE_STEPS = 32
FIRST_ORDINARY_TOKEN_ID = 10
CHUNKED_PREFILL_TOKENS = 2048
PROFILES = Path("src") / "tandem" / "engine" / "simulated" / "profiles"
_numbers = itertools.count(1)
_draw = random.Random(0)


@dataclass(frozen=True)
class Sample:
    """One measured duration, and the factors of the model's coefficients for it."""

    kind: str
    name: str
    features: tuple[float, ...]
    measured_s: float


def prompt_of(length: int, vocabulary_size: int) -> tuple[int, ...]:
    """A fresh prompt, of which nothing is in the prefix cache."""
    return tuple(_draw.randrange(FIRST_ORDINARY_TOKEN_ID, vocabulary_size) for _ in range(length))


class Stopwatch:
    """What the engine spends on something: wall time, or the processor time of its scheduler.

    On a CPU with one thread, the scheduler computes all that it waits for: its processor time is what a step takes on
    a machine with nothing else to do, and can be measured on one that has.
    """

    def __init__(self, pid: int | None) -> None:
        """`pid` of the scheduler; None: wall time."""
        self._pid = pid

    def now_s(self) -> float:
        if self._pid is None:
            return time.monotonic()
        files = Path(f"/proc/{self._pid}/task").glob("*/schedstat")
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9

    @classmethod
    def of_scheduler(cls) -> Stopwatch:
        children = psutil.Process().children(recursive=True)
        return cls(next(child.pid for child in children if "scheduler" in child.name()))


class Bench:
    """One engine under measurement."""

    def __init__(self, engine: Engine, watch: Stopwatch, repeats: int) -> None:
        self.engine = engine
        self._watch = watch
        self._repeats = repeats

    async def batch_s(self, count: int, length: int, new_tokens: int) -> float:
        """What some equal requests with fresh prompts cost, started at once."""
        size = self.engine.capabilities().vocabulary_size
        begin_s = self._watch.now_s()
        await asyncio.gather(*(generate(self.engine, prompt_of(length, size), new_tokens) for _ in range(count)))
        return self._watch.now_s() - begin_s

    async def shortest_batch_s(self, count: int, length: int, new_tokens: int) -> float:
        """The shortest of several repeats: interference only ever adds time."""
        return min([await self.batch_s(count, length, new_tokens) for _ in range(self._repeats)])

    async def decode_step_s(self, count: int, context: int) -> float:
        """One step of a batch: the difference of two lengths of generation, without the prompts and the start."""
        short, long = SHORT_TOKENS, SHORT_TOKENS + DECODE_STEPS
        pairs = [
            await self.batch_s(count, context, long) - await self.batch_s(count, context, short)
            for _ in range(self._repeats)
        ]
        return statistics.median(pairs) / DECODE_STEPS

    async def measure(self) -> tuple[list[Sample], dict[tuple[int, int, int], float]]:
        """The grid and the checks."""
        await self.batch_s(8, 64, 16)
        samples = []
        for length in PROMPTS:
            cost_s = await self.shortest_batch_s(1, length, 1)
            samples.append(Sample("prefill", f"{length} tokens", (1.0, length, length * length / 2), cost_s))
        for batch, context in itertools.product(BATCHES, CONTEXTS):
            cost_s = await self.decode_step_s(batch, context)
            features = (1.0, batch, batch * (context + SHORT_TOKENS + DECODE_STEPS / 2))
            samples.append(Sample("decode", f"{batch} x {context} tokens", features, cost_s))
        return samples, {check: await self.shortest_batch_s(*check) for check in CHECKS}


async def generate(engine: Engine, token_ids: tuple[int, ...], new_tokens: int) -> None:
    """One request to its end."""
    request = EngineRequest(
        request_id=f"fit-{next(_numbers):06d}",
        token_ids=token_ids,
        sampling=Sampling(temperature=0.0),
        stopping=Stopping(max_tokens=new_tokens, ignore_eos=True),
    )
    async for _ in pulling.generate(engine, request):
        pass


async def measure_pair(model: Path, flags: dict[str, str], repeats: int) -> list[Sample]:
    """Durations of KV transfers between the engines of a cluster, as the engines report them."""
    samples = []
    size = read_checkpoint(model).vocabulary_size
    with tempfile.TemporaryDirectory() as state:
        spec = ClusterSpec(model=model, log_directory=Path(state), worker_flags=flags)
        async with LocalCluster(spec) as cluster, open_channel(cluster.frontend.address) as channel:
            stub = InferenceServiceStub(channel)
            for length in TRANSFERS:
                moves = [await hand_over(stub, prompt_of(length, size)) for _ in range(4 * repeats)]
                # The shortest, because a machine only ever adds time.
                duration_s, size_bytes = min(moves)
                samples.append(Sample("transfer", f"{length} tokens", (1.0, float(size_bytes)), duration_s))
    return samples


async def hand_over(stub: Any, prompt: tuple[int, ...]) -> tuple[float, int]:
    """Time and bytes of one request's KV."""
    request = pb.GenerateRequest(
        stopping=sampling_pb2.Stopping(max_tokens=2, ignore_eos=True), sampling=sampling_pb2.Sampling(temperature=0)
    )
    request.token_ids.ids.extend(prompt)
    async for event in stub.Generate(request):
        if event.HasField("finish"):
            timings = event.finish.timings
            begin, end = timings.kv_transfer_start_time, timings.kv_transfer_end_time
            return (end.ToNanoseconds() - begin.ToNanoseconds()) / 1e9, timings.kv_transfer_bytes
    raise SystemExit("a stream ended without a finish")


def fit(samples: list[Sample]) -> list[float]:
    """Coefficients from 0 up with the least squares of the relative errors."""
    measured = np.array([s.measured_s for s in samples])
    features = np.array([s.features for s in samples]) / measured[:, None]
    kept = list(range(features.shape[1]))
    while kept:
        found, *_ = np.linalg.lstsq(features[:, kept], np.ones(len(samples)), rcond=None)
        if min(found) >= 0:
            break
        # A duration cannot be negative: the term that wants to be is none.
        kept.pop(int(np.argmin(found * np.abs(features[:, kept]).mean(axis=0))))
    coefficients = [0.0] * features.shape[1]
    for place, value in zip(kept, found, strict=True):
        coefficients[place] = float(f"{value:.4g}")
    return coefficients


def options_of(fits: dict[str, list[float]], capabilities: Capabilities) -> dict[str, float]:
    """The fit as options of the simulated engine."""
    step_s, token_s, pair_s = fits["prefill"]
    decode_s, request_s, context_s = fits["decode"]
    options = {
        "prefill_step_s": step_s,
        "prefill_tokens_per_s": float(f"{1 / token_s:.4g}") if token_s else 1e9,
        "prefill_pair_s": pair_s,
        "decode_step_s": decode_s,
        "decode_request_s": request_s,
        "decode_context_token_s": context_s,
        "page_size_tokens": capabilities.page_size_tokens,
        "chunked_prefill_tokens": CHUNKED_PREFILL_TOKENS,
    }
    if "transfer" in fits:
        latency_s, byte_s = fits["transfer"]
        options["transfer_latency_s"] = latency_s
        options["transfer_bytes_per_s"] = float(f"{1 / byte_s:.4g}") if byte_s else 1e12
    return options


async def simulated_batch_s(model: Path, options: dict[str, float], check: tuple[int, int, int]) -> float:
    """Time that the simulated engine needs for a check, in virtual time."""
    settings = EngineSettings(role=WorkerRole.AGGREGATED, model_path=model, model_name="fit", extra=dict(options))
    engine = SimulatedEngine(settings, LoopClock(), MemoryNetwork())
    await engine.start()
    clock = asyncio.get_running_loop()
    count, length, new_tokens = check
    begin_s = clock.time()
    size = engine.capabilities().vocabulary_size
    await asyncio.gather(*(generate(engine, prompt_of(length, size), new_tokens) for _ in range(count)))
    duration_s = clock.time() - begin_s
    await engine.stop()
    return duration_s


def report(samples: list[Sample], fits: dict[str, list[float]]) -> list[dict[str, object]]:
    """Print the residuals of the fit."""
    rows: list[dict[str, object]] = []
    print(f"{'step':10}{'of':>18}{'measured ms':>14}{'fitted ms':>12}{'off by':>9}")
    for sample in samples:
        fitted_s = sum(c * f for c, f in zip(fits[sample.kind], sample.features, strict=True))
        off = fitted_s / sample.measured_s - 1
        print(f"{sample.kind:10}{sample.name:>18}{sample.measured_s * 1e3:14.3f}{fitted_s * 1e3:12.3f}{off:9.1%}")
        rows.append({**asdict(sample), "features": None, "fitted_s": round(fitted_s, 6)})
        del rows[-1]["features"]
    return rows


async def measure(arguments: argparse.Namespace) -> tuple[list[Sample], dict[Batch, float], Capabilities]:
    settings = EngineSettings(
        role=WorkerRole.AGGREGATED,
        model_path=arguments.model,
        model_name="fit",
        device=arguments.device,
        dtype=arguments.dtype,
        threads=1,
        extra={"chunked_prefill_size": CHUNKED_PREFILL_TOKENS},
    )
    engine = create_engine("sglang", settings)
    await engine.start()
    try:
        capabilities = engine.capabilities()
        watch = Stopwatch.of_scheduler() if arguments.device == "cpu" else Stopwatch(None)
        samples, checks = await Bench(engine, watch, arguments.repeats).measure()
    finally:
        await engine.stop()
    return samples, checks, capabilities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, help="default: a profile named for the model")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument(
        "--device", default="cpu", help="cpu or cuda; on a GPU, wall time is measured instead of CPU time"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pair", action="store_true", help="also measure KV transfers")
    arguments = parser.parse_args()
    flags = {"device": arguments.device, "dtype": arguments.dtype}
    # First, because an engine in this process takes the event loops that could start others.
    moves = asyncio.run(measure_pair(arguments.model, flags, arguments.repeats)) if arguments.pair else []
    samples, checks, capabilities = asyncio.run(measure(arguments))
    samples += moves
    kinds = list(dict.fromkeys(sample.kind for sample in samples))
    fits = {kind: fit([s for s in samples if s.kind == kind]) for kind in kinds}
    options = options_of(fits, capabilities)
    rows = report(samples, fits)
    for check, measured_s in checks.items():
        simulated_s = run_virtually(simulated_batch_s(arguments.model, options, check))
        count, length, new_tokens = check
        name = f"{count} requests of {length} + {new_tokens} tokens"
        print(f"check: {name}: {measured_s:.3f} s, simulated {simulated_s:.3f} s ({simulated_s / measured_s - 1:+.1%})")
        rows.append({"kind": "check", "name": name, "measured_s": measured_s, "fitted_s": round(simulated_s, 6)})
    output = arguments.output or PROFILES / f"{arguments.model.name}-{arguments.device}.json"
    made = {
        "command": " ".join(["python", *sys.argv]),
        "day": time.strftime("%Y-%m-%d"),
        "engine": f"{capabilities.engine} {capabilities.engine_version}",
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    output.write_text(json.dumps({"options": options, "made": made, "residuals": rows}, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
