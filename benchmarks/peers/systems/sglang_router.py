"""sglang-router, disaggregated: HTTP for clients, the same HTTP to workers; it tokenises nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.peers.children import HOST, START_TIMEOUT_S, Program, StartError, free_port, running
from benchmarks.peers.clocks import Parts
from benchmarks.peers.environment import Environment
from benchmarks.peers.systems.door import Door, Running, Surroundings, fleet

BOOTSTRAP_PORT = 8998
"""Where prefill engines would meet decode engines; none ever connects."""
LISTEN_POLL_S = 0.1


async def wait_listening(program: Program, port: int) -> None:
    """Return when a program takes connections.

    Raises:
        StartError: it ended first, or takes too long.
    """
    for _ in range(int(START_TIMEOUT_S / LISTEN_POLL_S)):
        program.check_runs()
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            return
        await asyncio.sleep(LISTEN_POLL_S)
    raise StartError(f"{program.name} did not listen in time: {program.last_words()}")


@dataclass(frozen=True)
class SglangRouter:
    """sglang-router from the package index."""

    environment: Environment
    name: str = "sglang-router"

    @contextlib.asynccontextmanager
    async def start(self, around: Surroundings) -> AsyncIterator[Running]:
        """Workers, router."""
        async with fleet("http", around) as workers:
            port = free_port()
            command = [str(self.environment.python(self.name)), "-m", "sglang_router.launch_router"]
            command += [f"--host={HOST}", f"--port={port}", "--pd-disaggregation", "--policy=random"]
            command += [f"--prometheus-host={HOST}", f"--prometheus-port={free_port()}", "--log-level=warn"]
            command += [f"--max-concurrent-requests={around.streams_max + 64}"]
            for one in workers.ports["prefill"]:
                command += ["--prefill", f"http://{HOST}:{one}", str(BOOTSTRAP_PORT)]
            for one in workers.ports["decode"]:
                command += ["--decode", f"http://{HOST}:{one}"]
            async with running(Program("sglang-router", command, around.logs, dict(os.environ))) as router:
                await wait_listening(router, port)
                label = f"sglang-router {self.environment.version(self.name)} PD random"
                parts = Parts([router.pid], [], [workers.helper.pid])
                yield Running([Door(label, "http", [f"{HOST}:{port}"], parts)], workers.helper)
