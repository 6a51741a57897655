"""What becomes of a stream when decode gives the pages of an ended hand-over back before prefill has done writing.

Three real engines on the CPU. A transfer worker of prefill-0 is stopped in the middle of a hand-over whose client
leaves; SGLang's decode engine waits `--release-s` for it. Another request is then served from the pages that are free,
and the transfer worker goes on. Prints how many of its tokens are still the undisturbed ones: docs/adr/0009.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

from tandem.testing.eventually import assert_eventually
from tests.faults.history import now_s
from tests.faults.sglang_legs import TRIES_MAX, SglangFleet, Stream, ended, prompt_of, sglang_fleet

SETTING = "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT"
WAIT_S = 3.0
"""From the end of the first request to the second one."""


async def on(fleet: SglangFleet, worker: str, phase: str) -> Stream:
    """A stream of that phase that this prefill worker has; those that others have are given up."""
    for _ in range(TRIES_MAX):
        stream = fleet.begin(prompt_of(phase), phase)
        await assert_eventually(lambda stream=stream: stream.asked.workers, within_s=60, what="workers")
        if worker in stream.asked.workers:
            return stream
        await leave(stream)
    raise AssertionError(f"no request of {TRIES_MAX} came to {worker}")


async def leave(stream: Stream) -> None:
    """Give a stream up, as its client."""
    assert stream.task is not None
    stream.task.cancel()
    await asyncio.wait({stream.task})


async def run(logs: Path) -> None:
    """One round of it."""
    async with sglang_fleet(logs, prefill=2, decode=1) as fleet:
        answers = await fleet.answers([prompt_of("decoding")])
        await fleet.forget()
        fleet.holds.begin("prefill-0", phases=("transferring",))
        fleet.holds.begin("decode-0", phases=("decoding",))
        first = await on(fleet, "prefill-0", "transferring")
        await assert_eventually(lambda: fleet.is_in_phase(first, now_s()), within_s=60, what="the hold")
        await leave(first)
        await asyncio.sleep(WAIT_S)
        held = (await fleet.loads())["decode-0"].kv_used_tokens
        second = await on(fleet, "prefill-1", "decoding")
        await assert_eventually(lambda: len(second.asked.tokens) >= 10, within_s=60, what="tokens")
        fleet.holds.end("prefill-0")
        await asyncio.sleep(0.5)
        fleet.holds.end()
        await ended([second])
    asked = second.asked
    right = sum(got == wanted for got, wanted in zip(asked.tokens, answers[asked.prompt], strict=True))
    print(f"{held} tokens of pages still held {WAIT_S:g} s after the client has left")
    print(f"{right} of {len(asked.tokens)} tokens of the request after it are the undisturbed ones")


def main() -> None:
    """Parse, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release-s", type=float, default=1.0, help=SETTING)
    os.environ[SETTING] = str(parser.parse_args().release_s)
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))


if __name__ == "__main__":
    main()
