"""How many damaged hand-overs a decode engine notices: `python -m benchmarks.kv_faults --engine sglang`, or simulated.

Two engine processes hand over short prompts. Four of five have their KV damaged, in turn by each kind of fault, the
fifth is not touched. A fault is found if the decode engine refuses the KV; a hand-over without a fault must match. With
`--share 0` the same faults are not looked for. In SGLang a plugin of the tests damages what a prompt's first tokens ask
for; the simulated engine has rules for it, and each hand-over passes them in the order of arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem.engine.settings import EngineSettings
from tandem.engine.simulated.kv_content import DAMAGES
from tests.contract.support.engine_process import EngineProcess, RemoteError
from tests.contract.support.fleet import Pair, prompt_of
from tests.integration.support import kv_faults

MODEL = Path(".cache/models/tiny-random-float32")
ANSWER_TOKENS = 2
CORRUPT = "KvCorrupt"
NONE, ANY = "no fault", "any"


@dataclass
class Count:
    """What came of the hand-overs."""

    found: Counter[str] = field(default_factory=Counter)
    """By kind; of hand-overs without a fault: that matched."""
    missed: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)


async def hand_over(pair: Pair, kind: str, number: int, length: int, count: Count) -> None:
    """One prompt that no other hand-over has."""
    size = pair.decode.capabilities.vocabulary_size
    rest = prompt_of(length - 4, size, seed=number)
    prompt = (kv_faults.mark(kind) if kind in kv_faults.KINDS else prompt_of(4, size, seed=number)) + rest
    prefill, decode = pair.begin(prompt, ANSWER_TOKENS)
    outcomes = await asyncio.gather(prefill.all(), decode.all(), return_exceptions=True)
    problem = outcomes[1]
    if isinstance(problem, RemoteError):
        if kind != ANY:
            (count.found if problem.name == CORRUPT and kind != NONE else count.missed)[kind] += 1
        count.checks[problem.name] += 1
        return
    if isinstance(problem, BaseException):
        raise problem
    check = problem.finish.kv_check
    count.checks["none" if check is None else check.value] += 1
    if kind != ANY:
        (count.found if kind == NONE and check is not None else count.missed)[kind] += 1


def settings_of(given: argparse.Namespace, role: WorkerRole) -> EngineSettings:
    """Of one engine; the simulated decode engine has the rules of the faults too."""
    extra: dict[str, Any] = {"page_size": given.page}
    if given.engine == "simulated":
        extra = {"page_size_tokens": given.page}
        if role is WorkerRole.DECODE:
            # Of each five hand-overs, one by each rule but the last; as many as there are to be faults.
            every = len(DAMAGES) + 1
            each = given.faults // len(DAMAGES)
            extra["faults"] = [
                {"point": "kv_arrived", "kind": kind, "nth": number, "every": every, "times": each}
                for number, kind in enumerate(DAMAGES, 1)
            ]
    return EngineSettings(
        role=role,
        model_path=Path(given.model),
        model_name="m",
        device=given.device,
        dtype=given.dtype,
        kv_check_share=given.share,
        extra={**extra, **json.loads(given.engine_extra)},
    )


def work_of(given: argparse.Namespace) -> list[str]:
    """The kinds of fault to ask for, one for each hand-over, and NONE."""
    if given.engine == "simulated":
        # Its rules choose; in the order in which hand-overs arrive.
        return [ANY] * (given.faults // len(DAMAGES) * (len(DAMAGES) + 1))
    kinds, work = kv_faults.KINDS, list[str]()
    for number in range(given.faults):
        work.append(kinds[number % len(kinds)])
        # Hand-overs without a fault among the others, so that each kind has neighbours.
        work += [NONE] if number % 4 == 3 else []
    return work


async def measure(given: argparse.Namespace, directory: Path) -> dict[str, object]:
    """Run the hand-overs, some at a time; returns the counts."""
    plugin = kv_faults.plug_in(directory)
    engines = [
        await EngineProcess.spawn(given.engine, settings_of(given, role), directory / "engines.log", plugin)
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE)
    ]
    count, begin_s = Count(), time.monotonic()
    try:
        await asyncio.gather(*(engine.start() for engine in engines))
        pair, waiting = Pair(*engines), asyncio.Semaphore(given.concurrent)

        async def one(number: int, kind: str) -> None:
            async with waiting:
                await hand_over(pair, kind, number, given.tokens, count)

        await asyncio.gather(*(one(number, kind) for number, kind in enumerate(work_of(given))))
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))
    return {
        "engine": given.engine,
        "faults": given.faults,
        "fired": dict(Counter(kv_faults.fired(directory))),
        "found": dict(sorted(count.found.items())),
        "missed": dict(sorted(count.missed.items())),
        "results": dict(count.checks),
        "seconds": round(time.monotonic() - begin_s, 1),
    }


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("sglang", "simulated"), default="sglang")
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=100, help="of a prompt")
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--engine-extra", default="{}", help="JSON of further arguments of the engines")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-kv-faults-") as directory:
        try:
            print(json.dumps(asyncio.run(measure(given, Path(directory))), indent=2))
        except BaseException:
            print((Path(directory) / "engines.log").read_text()[-4000:])
            raise


if __name__ == "__main__":
    main()
