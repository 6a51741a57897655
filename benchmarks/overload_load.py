"""The clients of `benchmarks.overload`, in their own process: open-loop Poisson arrivals.

Reads a plan as JSON from standard input and writes the outcome of each request, one JSON object per line, to the plan's
file. It also sends health checks to an idle process; their latency shows interference on the machine. Every request has
a deadline, as with real clients, and none is retried: a retry would be another arrival.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub
from tandem.client.health_calls import check_health
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error

CHANNELS_PER_FRONTEND = 2
WORDS = (
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "little",
    "red",
    "key",
    "under",
    "old",
    "bridge",
    "and",
    "barn",
    "near",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked, how often, and for how long."""

    frontends: list[str]
    rate_per_s: float
    seconds: float
    seed: int
    file: str
    deadline_s: tuple[float, float] = (3.0, 12.0)
    """Drawn evenly from this range."""
    max_tokens: tuple[int, int] = (8, 24)
    prompt_words: tuple[int, int] = (20, 60)
    tenants: int = 1
    idle: str = ""
    """host:port of a process that does nothing; empty: none is asked."""


@dataclass(slots=True)
class Asked:
    """What became of one request. Times are seconds since the load began, by this process's clock."""

    due_s: float
    """When it was to be sent; what lies between is the load generator's own delay."""
    start_s: float
    deadline_s: float
    first_token_s: float | None = None
    end_s: float = 0.0
    outcome: str = ""
    """"finished", or the reason of the error."""
    retry_delay_s: float | None = None
    """As RetryInfo says; None: there was none."""
    tokens: int = 0


IDLE_EVERY_S = 0.1
IDLE = "idle"
"""The outcome of a question to the idle process."""


async def ask_all(plan: Plan) -> list[Asked]:
    """Send everything, and wait until all has ended."""
    channels = [open_channel(address) for address in plan.frontends for _ in range(CHANNELS_PER_FRONTEND)]
    stubs: list[Any] = [InferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        await channel.channel_ready()
    draw, begin_s, due_s = random.Random(plan.seed), time.monotonic(), 0.0
    asked: list[Asked] = []
    asking = asyncio.create_task(_ask_idle(plan.idle, asked, begin_s))
    try:
        async with asyncio.TaskGroup() as group:
            while due_s < plan.seconds:
                await asyncio.sleep(max(0.0, begin_s + due_s - time.monotonic()))
                one = Asked(due_s, time.monotonic() - begin_s, draw.uniform(*plan.deadline_s))
                asked.append(one)
                request, tenant = _request(plan, draw), f"tenant-{draw.randrange(plan.tenants)}"
                stub = stubs[draw.randrange(len(stubs))]
                group.create_task(_ask(stub, request, tenant, one, begin_s))
                due_s += draw.expovariate(plan.rate_per_s)
    finally:
        asking.cancel()
        for channel in channels:
            await channel.close()
    return asked


async def _ask_idle(address: str, asked: list[Asked], begin_s: float) -> None:
    if not address:
        return
    async with open_channel(address) as channel:
        await channel.channel_ready()
        while True:
            one = Asked(0.0, time.monotonic() - begin_s, 0.0, outcome=IDLE)
            one.due_s = one.start_s
            await check_health(channel, 5.0)
            one.end_s = time.monotonic() - begin_s
            asked.append(one)
            await asyncio.sleep(IDLE_EVERY_S)


def _request(plan: Plan, draw: random.Random) -> pb.GenerateRequest:
    words = draw.choices(WORDS, k=draw.randint(*plan.prompt_words))
    stopping: Any = {"max_tokens": draw.randint(*plan.max_tokens), "ignore_eos": True}
    return pb.GenerateRequest(prompt=" ".join(words), sampling={"temperature": 0.0}, stopping=stopping)  # type: ignore[arg-type]


async def _ask(stub: Any, request: pb.GenerateRequest, tenant: str, asked: Asked, begin_s: float) -> None:
    call = stub.Generate(request, timeout=asked.deadline_s, metadata=(("x-client-id", tenant),))
    try:
        async for event in call:
            if event.HasField("chunk"):
                asked.tokens += len(event.chunk.token_ids)
                if asked.first_token_s is None:
                    asked.first_token_s = time.monotonic() - begin_s
            elif event.HasField("finish"):
                asked.outcome = "finished"
    except grpc.aio.AioRpcError as failure:
        asked.end_s = time.monotonic() - begin_s
        asked.outcome = from_rpc_error(failure).reason
        asked.retry_delay_s = _retry_delay_s(failure)
    else:
        asked.end_s = time.monotonic() - begin_s


def _retry_delay_s(failure: grpc.aio.AioRpcError) -> float | None:
    """What the error itself says, without a default."""
    status = rpc_status.from_call(failure)  # type: ignore[arg-type]
    retry = error_details_pb2.RetryInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(retry):
            return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return None


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    asked = asyncio.run(ask_all(plan))
    with open(plan.file, "w") as file:
        for one in asked:
            file.write(json.dumps(asdict(one)) + "\n")


if __name__ == "__main__":
    main()
