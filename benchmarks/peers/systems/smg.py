"""SMG's gRPC router, disaggregated: HTTP for clients, tokenised requests to workers that speak smg-grpc-proto."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.peers.children import HOST, Program, free_port, running
from benchmarks.peers.clocks import Parts
from benchmarks.peers.environment import Environment
from benchmarks.peers.systems.door import Door, Running, Surroundings, fleet
from benchmarks.peers.systems.sglang_router import BOOTSTRAP_PORT, wait_listening


@dataclass(frozen=True)
class Smg:
    """SMG from the package index."""

    environment: Environment
    name: str = "smg"

    @contextlib.asynccontextmanager
    async def start(self, around: Surroundings) -> AsyncIterator[Running]:
        """Workers, router."""
        python = self.environment.python(self.name)
        async with fleet("smg", around, python=python) as workers:
            port = free_port()
            command = [str(python), "-m", "smg.launch_router", f"--host={HOST}", f"--port={port}"]
            command += [f"--prometheus-host={HOST}", f"--prometheus-port={free_port()}"]
            command += ["--pd-disaggregation", "--policy=random", "--log-level=warn", f"--model-path={around.model}"]
            command += [f"--max-concurrent-requests={around.streams_max + 64}"]
            for one in workers.ports["prefill"]:
                command += ["--prefill", f"grpc://{HOST}:{one}", str(BOOTSTRAP_PORT)]
            for one in workers.ports["decode"]:
                command += ["--decode", f"grpc://{HOST}:{one}"]
            async with running(Program("smg", command, around.logs, dict(os.environ))) as router:
                await wait_listening(router, port)
                label = f"SMG {self.environment.version(self.name)} gRPC random"
                parts = Parts([router.pid], [], [workers.helper.pid])
                yield Running([Door(label, "http", [f"{HOST}:{port}"], parts)], workers.helper)
