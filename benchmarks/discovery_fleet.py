"""The other processes of `benchmarks.discovery_scale`: many workers in one process, or one frontend in one.

Workers have no engine; their registrations, addresses and health checks are real. Frontends have no requests; their
watch is real. Both read one command per line on stdin, and respond with one line of JSON. Times are from the machine's
monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tandem.discovery import Registration, WorkerWatch
from tandem.domain.worker import LEG_CONTRACT, Capabilities, Worker, WorkerRole
from tandem.rpc.process_servicer import SERVICE_NAME as PROCESS_SERVICE_NAME

CAPABILITIES = Capabilities(
    engine="simulated",
    engine_version="1",
    model="scale",
    model_digest="0" * 64,
    tokenizer_digest="1" * 64,
    context_tokens_max=4096,
    kv_capacity_tokens=65536,
    running_requests_max=16,
    vocabulary_size=32000,
    eos_token_ids=(2,),
    page_size_tokens=16,
    kv_dtype="bfloat16",
    kv_layout="mha:32x8x128",
    kv_bytes_per_token=131072,
    transfer_backend="simulated",
)
Command = Callable[[str], Awaitable[Any]]


class Troubles(logging.Handler):
    """Counts warnings instead of showing a thousand of them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """One more."""
        self.count += 1


class Workers:
    """Workers of one process: `count` of them, named from `first` on, each with a port of its own."""

    def __init__(self, registry: str, first: int, count: int) -> None:
        self.troubles = Troubles()
        self._registry = registry.split(",")
        self._names = [f"worker-{first + number:05d}" for number in range(count)]
        self._registrations: dict[str, Registration] = {}
        self._addresses: dict[str, str] = {}
        self._server = grpc.aio.server()

    async def start(self) -> None:
        """Listen on all ports."""
        servicer = health.aio.HealthServicer()
        for service in ("", PROCESS_SERVICE_NAME):
            await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        for name in self._names:
            self._addresses[name] = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def register(self, at_once: str = "") -> dict[str, float]:
        """All of them, so many at a time (default: all); returns when the last one has its lease."""
        begin_s, gate = time.monotonic(), asyncio.Semaphore(int(at_once or len(self._names)))

        async def one(name: str) -> None:
            async with gate:
                await self.come(name)

        await asyncio.gather(*(one(name) for name in self._names))
        return {"seconds": time.monotonic() - begin_s}

    async def trouble(self, _: str) -> dict[str, int]:
        """Warnings of registrations since the last answer."""
        count, self.troubles.count = self.troubles.count, 0
        return {"warnings": count}

    async def come(self, name: str) -> dict[str, float]:
        """One of them; returns when it was asked for."""
        number = self._names.index(name)
        is_prefill = number % 2 == 0
        worker = Worker(
            worker_id=name,
            epoch=time.time_ns() // 1_000_000,
            role=WorkerRole.PREFILL if is_prefill else WorkerRole.DECODE,
            address=self._addresses[name],
            capabilities=CAPABILITIES,
            bootstrap_host="127.0.0.1" if is_prefill else None,
            bootstrap_port=9000 if is_prefill else None,
            leg_contract=LEG_CONTRACT,
        )
        asked_s = time.monotonic()
        registration = self._registrations[name] = Registration(self._registry, worker)
        await registration.start()
        await registration.wait_registered()
        return {"asked_s": asked_s}

    async def leave(self, name: str) -> dict[str, float]:
        """One of them; returns when it was asked for."""
        asked_s = time.monotonic()
        await self._registrations.pop(name).close()
        return {"asked_s": asked_s}

    async def close(self, _: str = "") -> dict[str, float]:
        """All of them leave, and their ports are closed."""
        await asyncio.gather(*(registration.close() for registration in self._registrations.values()))
        await self._server.stop(0)
        return {"processor_s": _processor_s()}


class Frontend:
    """One frontend's watch, and the times of the events it received."""

    def __init__(self, registry: str) -> None:
        self._registry = registry.split(",")
        self._watch: WorkerWatch | None = None
        self._known: frozenset[str] = frozenset()
        self._seen: list[tuple[str, str, float]] = []

    async def open(self, count: str) -> dict[str, float]:
        """Begin to watch; returns how long it took until so many workers were known."""
        begin_s = time.monotonic()
        self._watch = WorkerWatch(self._registry, on_change=self._note)
        await self._watch.start()
        await self._watch.wait_for(lambda workers: len(workers) >= int(count), 60)
        return {"seconds": time.monotonic() - begin_s, "workers": len(self._watch.workers())}

    async def close(self, _: str) -> dict[str, float]:
        """Watch no more."""
        assert self._watch is not None, "close before open"
        await self._watch.close()
        return {"processor_s": _processor_s()}

    async def seen(self, _: str) -> list[tuple[str, str, float]]:
        """What came and left since the last answer: what, who, when."""
        seen, self._seen = self._seen, []
        return seen

    def _note(self, workers: tuple[Worker, ...]) -> None:
        now_s, known = time.monotonic(), frozenset(worker.worker_id for worker in workers)
        self._seen += [("come", name, now_s) for name in known - self._known]
        self._seen += [("leave", name, now_s) for name in self._known - known]
        self._known = known


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def obey(commands: dict[str, Command]) -> None:
    """Run commands from stdin until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        name, _, argument = line.partition(" ")
        print(json.dumps(await commands[name](argument)), flush=True)


async def run(arguments: list[str]) -> None:
    kind, registry, *numbers = arguments
    if kind == "workers":
        workers = Workers(registry, *(int(number) for number in numbers))
        logging.getLogger().addHandler(workers.troubles)
        await workers.start()
        return await obey(
            {
                "register": workers.register,
                "trouble": workers.trouble,
                "come": workers.come,
                "leave": workers.leave,
                "close": workers.close,
            }
        )
    frontend = Frontend(registry)
    return await obey({"open": frontend.open, "seen": frontend.seen, "close": frontend.close})


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))
