"""The sixteen scenarios, named as in docs/evidence/failure-model.md, each with what it promises to clients.

A scenario breaks something under load and returns what it measured. It passes if no stream failed that need not, every
token is that of an undisturbed run, and the time is within the bound of the failure model plus a second for a machine
that is busy with the whole fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.scorecard.fleet import Fleet, Stream, until
from tandem.cli.operations import drain
from tandem.errors import DeadlinePassed, Overloaded

SLACK_S = 1.0
STREAMS = 8
LONG = 1_000
"""Tokens of a prompt that is computed for a quarter of a second."""


@dataclass(frozen=True)
class Outcome:
    """What one scenario met."""

    time_s: float
    what: str
    """What the time is."""
    failed: int = 0
    note: str = ""


Run = Callable[[Fleet], Awaitable[Outcome]]


@dataclass(frozen=True)
class Scenario:
    """One line of the scorecard."""

    name: str
    run: Run
    bound_s: float
    failed_max: int = 0
    """Streams that may fail, with a typed error."""


def _outcome(streams: Sequence[Stream], since_s: float, what: str = "longest pause of a stream") -> Outcome:
    pause_s = max(stream.longest_pause_s(since_s) for stream in streams)
    return Outcome(pause_s, what, failed=sum(not stream.is_right for stream in streams))


async def _streaming(streams: Sequence[Stream], tokens: int = 10) -> None:
    async def least() -> int:
        return min(len(stream.token_ids) for stream in streams)

    await until(least, lambda count: count >= tokens)


async def _at_prefill(fleet: Fleet, streams: Sequence[Stream]) -> None:
    async def accepted() -> int:
        return sum(bool(stream.workers) for stream in streams)

    await until(accepted, lambda count: count > 0)
    await until(fleet.held, lambda count: count > 0)


def killed(name: str) -> Run:
    """Kill a process in mid-stream."""

    async def run(fleet: Fleet) -> Outcome:
        async with fleet.streams(STREAMS) as streams:
            await _streaming(streams)
            since_s = await fleet.kill(name)
        return _outcome(streams, since_s)

    return run


def stopped(name: str) -> Run:
    """Stop a process in mid-stream (SIGSTOP), until all streams have ended."""

    async def run(fleet: Fleet) -> Outcome:
        async with fleet.streams(STREAMS) as streams:
            await _streaming(streams)
            since_s = time.perf_counter()
            fleet.process(name).signal(signal.SIGSTOP)
        return _outcome(streams, since_s)

    return run


def drained(name: str) -> Run:
    """Drain a worker in mid-stream."""

    async def run(fleet: Fleet) -> Outcome:
        async with fleet.streams(STREAMS) as streams:
            await _streaming(streams)
            since_s = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                assert await drain(name, [fleet.cluster.registry.address], None) == 0
            await fleet.process(name).wait_ended()
        return _outcome(streams, since_s)

    return run


async def prefill_killed_with_prompts(fleet: Fleet) -> Outcome:
    """Prompts are queued and computed at both prefill workers when one is killed."""
    async with fleet.streams(STREAMS, prompt=LONG, tokens=10) as streams:
        await _at_prefill(fleet, streams)
        since_s = await fleet.kill("prefill-0")
    return _outcome(streams, since_s, "last first token")


async def prefill_stopped_with_prompts(fleet: Fleet) -> Outcome:
    """The same with SIGSTOP."""
    async with fleet.streams(STREAMS, prompt=LONG, tokens=10) as streams:
        await _at_prefill(fleet, streams)
        since_s = time.perf_counter()
        fleet.process("prefill-0").signal(signal.SIGSTOP)
    return _outcome(streams, since_s, "last first token")


async def pair_killed(fleet: Fleet) -> Outcome:
    """A prefill and a decode worker at the same moment."""
    async with fleet.streams(STREAMS) as streams:
        await _streaming(streams)
        since_s = time.perf_counter()
        await asyncio.gather(fleet.kill("prefill-1"), fleet.kill("decode-1"))
    return _outcome(streams, since_s)


async def worker_killed_without_registry(fleet: Fleet) -> Outcome:
    """The registry is gone when a decode worker dies: no list says so."""
    await fleet.kill("registry")
    async with fleet.streams(STREAMS) as streams:
        await _streaming(streams)
        since_s = await fleet.kill("decode-1")
    async with fleet.streams(STREAMS, tokens=10) as later:
        pass
    found = _outcome([*streams, *later], since_s)
    return Outcome(_outcome(streams, since_s).time_s, found.what, found.failed)


async def frontend_killed(fleet: Fleet) -> Outcome:
    """Half of the streams are at a frontend that is killed; afterwards every new HTTP request is served."""
    async with fleet.streams(STREAMS) as streams:
        await _streaming(streams)
        since_s = await fleet.kill("frontend-1")
        served = await _http_failures(fleet, 20)
    lost = [stream for stream in streams if stream.problem is not None]
    others = [stream for stream in streams if stream.problem is None]
    wrong = sum(not stream.is_right for stream in others) + served
    note = f"{len(lost)} streams of that frontend ended with an error"
    return Outcome(_outcome(others, since_s).time_s, "longest pause of the others", wrong, note)


async def _http_failures(fleet: Fleet, count: int) -> int:
    assert fleet.cluster.edge is not None
    async with httpx.AsyncClient(base_url=f"http://{fleet.cluster.edge.address}", timeout=20) as client:
        answers = [
            await client.post("/v1/generate", json={"prompt": "Once", "stopping": {"max_tokens": 2}})
            for _ in range(count)
        ]
    return sum(answer.status_code != 200 for answer in answers)


def cancelled(prompt: int, tokens: int) -> Run:
    """Clients leave, while their prompts are computed (no token yet) or in mid-stream."""

    async def run(fleet: Fleet) -> Outcome:
        tasks = []
        streams = [Stream() for _ in range(STREAMS)]
        for number, stream in enumerate(streams):
            tasks.append(asyncio.create_task(fleet.run(stream, prompt=prompt, tokens=tokens, frontend=number)))
        await (_at_prefill(fleet, streams) if prompt >= LONG else _streaming(streams))
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return Outcome(await fleet.idle_within_s(), "until the engines are idle")

    return run


async def cancelled_then_short(fleet: Fleet) -> Outcome:
    """A short prompt behind long ones that were cancelled."""
    await cancelled(LONG, 10)(fleet)
    async with fleet.streams(1, tokens=4) as (stream,):
        pass
    return Outcome(stream.times_s[0] - stream.begin_s, "first token of the next prompt", int(not stream.is_right))


async def burst(fleet: Fleet) -> Outcome:
    """More requests than both frontends may have open."""
    async with fleet.streams(STREAMS, tokens=60) as streams:
        await _streaming(streams)
        since_s = time.perf_counter()
        async with fleet.streams(600, tokens=4) as more:
            pass
    refused = sum(isinstance(stream.problem, Overloaded) for stream in more)
    wrong = sum(not stream.is_right and not isinstance(stream.problem, Overloaded) for stream in [*streams, *more])
    found = _outcome(streams, since_s)
    return Outcome(found.time_s, found.what, wrong, f"{refused} of {len(more)} refused with a delay to wait")


async def all_decode_killed(fleet: Fleet) -> Outcome:
    """No decode worker is left: each stream ends with one typed error, or finishes after the restart."""
    async with fleet.streams(STREAMS) as streams:
        await _streaming(streams)
        await asyncio.gather(fleet.kill("decode-0"), fleet.kill("decode-1"))
        since_s = time.perf_counter()
        await asyncio.gather(fleet.cluster.restart("decode-0"), fleet.cluster.restart("decode-1"))
    untyped = sum(
        (stream.problem is None and not stream.is_right) or isinstance(stream.problem, DeadlinePassed)
        for stream in streams
    )
    async with fleet.streams(STREAMS, tokens=4) as later:
        pass
    served_s = max(stream.times_s[0] if stream.times_s else float("inf") for stream in later) - since_s
    ended = sum(stream.problem is not None for stream in streams)
    wrong = untyped + sum(not stream.is_right for stream in later)
    return Outcome(served_s, "until new requests are served", wrong, f"{ended} of {STREAMS} ended with a typed error")


SCENARIOS = (
    Scenario("prefill killed, prompts queued", prefill_killed_with_prompts, 3.0),
    Scenario("prefill killed, decode streams", killed("prefill-0"), 0.5),
    Scenario("decode killed, mid-stream", killed("decode-0"), 0.5),
    Scenario("prefill stopped, prompts queued", prefill_stopped_with_prompts, 4.0),
    Scenario("decode stopped, mid-stream", stopped("decode-0"), 2.0),
    Scenario("prefill and decode killed at once", pair_killed, 0.5),
    Scenario("prefill drained", drained("prefill-0"), 0.5),
    Scenario("decode drained, mid-stream", drained("decode-0"), 0.5),
    Scenario("registry killed", killed("registry"), 0.5),
    Scenario("decode killed, no registry", worker_killed_without_registry, 0.5),
    Scenario("frontend killed", frontend_killed, 0.5),
    Scenario("clients cancel during prefill", cancelled(LONG, 10), 1.0),
    Scenario("clients cancel during decode", cancelled(64, 200), 1.0),
    Scenario("short prompt behind cancelled ones", cancelled_then_short, 0.5),
    Scenario("burst beyond the limit", burst, 1.0),
    Scenario("all decode workers killed", all_decode_killed, 15.0),
)
