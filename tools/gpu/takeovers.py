"""One of two workers of a role is killed, or all are restarted one after the other, while streams run.

The tokens of every stream are compared with an undisturbed run on the same cluster, and that run with a second one:
what differs there already is the engines' arithmetic, not the fault.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.local_cluster.cluster import LocalCluster
from tandem.rpc.channels import open_channel
from tools.gpu import agreement, endings
from tools.gpu.callers import Heard, prompt, request_of, stream
from tools.gpu.summaries import Streamed

SEED = 70_000
WATCH_TIMEOUT_S = 60.0
POLL_S = 0.005
STREAM_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """Streams that run while a worker goes."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    at_token: int
    """The worker is killed when each stream has had so many; 0: while prompts wait for the victim."""
    pause_s: float = 0.0
    """Of a caller between two streams of a rolling restart: a CPU also has to start the workers."""


GPU = {
    "decode": Takeover(streams=64, prompt_tokens=512, new_tokens=1000, at_token=16),
    "prefill": Takeover(streams=64, prompt_tokens=8000, new_tokens=64, at_token=0),
    "rolling": Takeover(streams=32, prompt_tokens=512, new_tokens=400, at_token=0),
}
REHEARSAL = {
    "decode": Takeover(streams=8, prompt_tokens=48, new_tokens=160, at_token=8),
    "prefill": Takeover(streams=8, prompt_tokens=800, new_tokens=24, at_token=0),
    "rolling": Takeover(streams=2, prompt_tokens=48, new_tokens=64, at_token=0, pause_s=1.0),
}


async def round_of(
    cluster: LocalCluster, work: Takeover, vocabulary_size: int, salt: str, heard: Sequence[Heard] = ()
) -> list[Streamed]:
    """All streams at once, the same prompts each time, under a salt so that no prefix cache has them."""
    heard = heard or [Heard() for _ in range(work.streams)]

    async def one(number: int) -> Streamed:
        address = cluster.frontends[number % len(cluster.frontends)].address
        return await ask(address, work, vocabulary_size, number, salt, heard[number])

    return list(await asyncio.gather(*(one(number) for number in range(work.streams))))


async def ask(
    address: str, work: Takeover, vocabulary_size: int, number: int, salt: str, heard: Heard | None = None
) -> Streamed:
    """The stream of that number."""
    token_ids = prompt(work.prompt_tokens, vocabulary_size, SEED + number)
    request = request_of(token_ids, work.new_tokens, salt)
    async with open_channel(address) as channel:
        return await stream(InferenceServiceStub(channel), request, STREAM_TIMEOUT_S, True, heard)


async def kill_one(cluster: LocalCluster, role: str, work: Takeover, vocabulary_size: int) -> dict[str, Any]:
    """Kill the first worker of a role and its engine, and start it again when the streams have ended.

    Raises:
        RuntimeError: the kill hit no stream, so it proves nothing.
    """
    victim = next(worker for worker in cluster.workers if worker.role == role)
    alone = await round_of(cluster, work, vocabulary_size, "alone")
    again = await round_of(cluster, work, vocabulary_size, "again")
    heard = [Heard() for _ in range(work.streams)]
    running = asyncio.create_task(round_of(cluster, work, vocabulary_size, "struck", heard))
    await until(lambda: ready(heard, victim.name, work.at_token), running)
    held = await endings.kv_tokens(cluster)
    struck_s = time.monotonic()
    victim.kill()
    status = await victim.wait_ended()
    ended_s = time.monotonic() - struck_s
    streams = await running
    references = [one.token_ids for one in alone]
    found = agreement.takeover(streams, references, victim.name, struck_s, work.new_tokens)
    without = await endings.next_request(cluster, vocabulary_size)
    begin_s = time.monotonic()
    await cluster.restart(victim.name)
    restart_s = time.monotonic() - begin_s
    if not found["went_on"]:
        raise RuntimeError(f"the kill of {victim.name} hit no stream: {found}")
    return {
        "killed": victim.name,
        "exit_status": status,
        "worker_ended_after_s": round(ended_s, 2),
        "kv_tokens_at_kill": held,
        "undisturbed_twice": agreement.agreement([one.token_ids for one in again], references),
        **found,
        "without_it": without,
        "restart_s": round(restart_s, 1),
        "after_restart": agreement.whole(await round_of(cluster, work, vocabulary_size, "after"), work.new_tokens),
    }


def ready(heard: Sequence[Heard], victim: str, at_token: int) -> bool:
    """Whether it is time for the kill: streams have come far enough, or a prompt waits for the victim."""
    if at_token:
        return all(len(one.arrivals_s) >= at_token for one in heard)
    return all(one.workers for one in heard) and any(victim in one.workers and not one.arrivals_s for one in heard)


async def until(is_so: Callable[[], bool], running: asyncio.Task[list[Streamed]]) -> None:
    """Wait for a state of the streams.

    Raises:
        RuntimeError: they ended before, or it did not come in time.
    """
    begin_s = time.monotonic()
    while not is_so():
        if running.done() or time.monotonic() > begin_s + WATCH_TIMEOUT_S:
            running.cancel()
            raise RuntimeError("the streams never came to the moment of the kill")
        await asyncio.sleep(POLL_S)


async def roll(cluster: LocalCluster, work: Takeover, vocabulary_size: int) -> dict[str, Any]:
    """Drain and restart every worker, one after the other, while callers go on."""
    alone = await round_of(cluster, work, vocabulary_size, "alone")
    ended: list[tuple[int, Streamed]] = []
    stop = asyncio.Event()

    async def call(number: int) -> None:
        address = cluster.frontends[number % len(cluster.frontends)].address
        turn = 0
        while not stop.is_set():
            ended.append((number, await ask(address, work, vocabulary_size, number, f"roll-{number}-{turn}")))
            turn += 1
            await asyncio.sleep(work.pause_s)

    callers = [asyncio.create_task(call(number)) for number in range(work.streams)]
    workers: dict[str, Any] = {}
    try:
        for worker in cluster.workers:
            begin_s = time.monotonic()
            status = await worker.stop()
            drained_s = time.monotonic() - begin_s
            await cluster.restart(worker.name)
            times = {"drained_s": round(drained_s, 2), "away_s": round(time.monotonic() - begin_s, 2)}
            workers[worker.name] = {"exit_status": status, **times}
    finally:
        stop.set()
        await asyncio.gather(*callers, return_exceptions=True)
    streams = [one for _, one in ended]
    references = [alone[number].token_ids for number, _ in ended]
    return {
        "callers": work.streams,
        "workers": workers,
        **agreement.restarts(streams, work.new_tokens),
        "tokens": agreement.agreement([one.token_ids for one in streams], references),
        "next_request": await endings.next_request(cluster, vocabulary_size),
    }
