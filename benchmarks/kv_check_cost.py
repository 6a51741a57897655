"""What checking the KV of hand-overs costs: TTFT of hand-overs that are checked, and of others that are not.

    python -m benchmarks.kv_check_cost                                                        # on a CPU
    python -m benchmarks.kv_check_cost --device cuda --dtype bfloat16 --model MODEL --tokens 2000 8000

One pair of engines with a `kv_check_share` of a half. Fresh prompts come one at a time, in turn with a bootstrap room
that is in the sample and one that is not, each kind first every second time: so both see the same engines and the same
machine. TTFT is the time from the submission of both legs until decode's first token. On a CPU the time of the two
digests alone is printed too, of rows in no order: it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

from tandem.domain.generation import KvCheck
from tandem.domain.kv_sample import is_sampled
from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.sglang.hooks import kv_check
from tests.contract.support.engine_process import EngineProcess
from tests.contract.support.fleet import Pair, prompt_of, request_of

MODEL = Path("models/tandem-demo")
WARM = 3
SHARE = 0.5
ON_A_GPU = {"mem_fraction_static": 0.4}
"""Both engines share the GPU, if there is one only."""


async def open_pair(given: argparse.Namespace, log: Path) -> Pair:
    """A prefill and a decode engine, which check a half of the hand-overs."""
    extra = ON_A_GPU if given.device == "cuda" else {}
    extra |= {} if given.page is None else {"page_size": given.page}
    engines = []
    for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
        settings = EngineSettings(
            role=role,
            model_path=Path(given.model),
            model_name="m",
            device=given.device,
            dtype=given.dtype,
            kv_capacity_tokens=given.capacity,
            kv_check_share=SHARE,
            extra={**extra, **json.loads(given.engine_extra)},
        )
        engines.append(await EngineProcess.spawn("sglang", settings, log))
    if given.device == "cpu":
        await asyncio.gather(*(engine.start() for engine in engines))
    else:
        # One at a time: each measures the memory that is left.
        for engine in engines:
            await engine.start()
    return Pair(*engines)


async def ttft_ms(pair: Pair, prompt: tuple[int, ...], *, checked: bool) -> float:
    """One prompt, until the first token at decode; asserts that its KV was compared, or was not."""
    while is_sampled((room := pair.room()).room, SHARE) is not checked:
        pass
    begin_s = time.perf_counter()
    prefill, decode = (engine.generate(request_of(prompt, 2, bootstrap=room)) for engine in (pair.prefill, pair.decode))
    await decode.tokens(1)
    waited_ms = (time.perf_counter() - begin_s) * 1e3
    await asyncio.gather(prefill.all(), decode.all())
    check = decode.result.finish.kv_check
    assert check is (KvCheck.MATCHED if checked else KvCheck.UNCHECKED), check
    return waited_ms


def digests_ms(tokens: int, kv_bytes_per_token: int, buffers: int) -> float:
    """The best of ten digests in host memory, for both engines: rows of a pool of four times the tokens."""
    import numpy

    width = kv_bytes_per_token // buffers
    pool = [numpy.random.default_rng(0).integers(0, 255, 4 * tokens * width, dtype=numpy.uint8) for _ in range(buffers)]
    rows = random.sample(range(4 * tokens), tokens)
    addresses, best_s = [buffer.ctypes.data for buffer in pool], math.inf
    for _ in range(10):
        begin_s = time.perf_counter()
        kv_check.digest([(rows, addresses, [width] * buffers)])
        best_s = min(best_s, time.perf_counter() - begin_s)
    return 2e3 * best_s


async def measure(given: argparse.Namespace, log: Path) -> None:
    """Print a row for each length of prompts."""
    pair = await open_pair(given, log)
    size = pair.decode.capabilities.vocabulary_size
    per_token = pair.decode.capabilities.kv_bytes_per_token
    try:
        print(f"{per_token:,} bytes of KV a token")
        print(
            "| prompt tokens | TTFT checked, ms | TTFT not checked, ms | more, of medians | more, median of couples "
            "| two digests alone, ms |\n|---|---|---|---|---|---|",
            flush=True,
        )
        # "mha:4x2x64": keys and values of each layer.
        buffers = 2 * int(pair.decode.capabilities.kv_layout.partition(":")[2].partition("x")[0])
        for tokens in given.tokens:
            couples: list[dict[bool, float]] = []
            for number in range(given.prompts + WARM):
                couple: dict[bool, float] = {}
                for checked in (True, False) if number % 2 else (False, True):
                    prompt = prompt_of(tokens, size, seed=random.getrandbits(60))
                    couple[checked] = await ttft_ms(pair, prompt, checked=checked)
                couples.append(couple)
            on, off = ([couple[checked] for couple in couples[WARM:]] for checked in (True, False))
            one_by_one = statistics.median((a - b) / b for a, b in zip(on, off, strict=True))
            medians = statistics.median(on), statistics.median(off)
            print(
                f"| {tokens:,} | {medians[0]:.1f} | {medians[1]:.1f} "
                f"| {medians[0] / medians[1] - 1:+.1%} | {one_by_one:+.1%} "
                f"| {'-' if given.device == 'cuda' else round(digests_ms(tokens, per_token, buffers), 2)} |",
                flush=True,
            )
    finally:
        await asyncio.gather(pair.prefill.close(), pair.decode.close())


def main() -> None:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[200, 1_000, 2_000])
    parser.add_argument("--prompts", type=int, default=30, help="of each kind and length")
    parser.add_argument("--page", type=int, default=None, help="tokens of a page; default: the engine's")
    parser.add_argument("--capacity", type=int, default=32_768, help="KV tokens of each engine")
    parser.add_argument("--engine-extra", default="{}", help="JSON of further arguments of SGLang")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-kv-check-") as directory:
        log = Path(directory) / "engines.log"
        try:
            asyncio.run(measure(given, log))
        except BaseException:
            print(log.read_text()[-4000:])
            raise


if __name__ == "__main__":
    main()
