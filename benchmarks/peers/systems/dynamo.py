"""NVIDIA Dynamo's frontend, disaggregated, before its own mocker: its contract with workers is its own runtime.

The mocker is given a table of times in which every step takes as long as the pace says. It answers with random tokens,
some without text of their own, so that tokens are counted by the usage. What a first token takes in it is not known.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import isolation
from benchmarks.peers.children import HOST, Program, StartError, free_port, running
from benchmarks.peers.clocks import Parts
from benchmarks.peers.environment import Environment
from benchmarks.peers.systems.door import Door, Running, Surroundings
from benchmarks.peers.systems.sglang_router import wait_listening

TIMES = """
import sys, numpy
file, step_ms = sys.argv[1], float(sys.argv[2])
numpy.savez(
    file,
    prefill_isl=numpy.array([1.0, 1024.0, 65536.0]),
    prefill_ttft_ms=numpy.full(3, 0.1),
    decode_active_kv_tokens=numpy.array([0.0, 1e4, 1e8]),
    decode_context_length=numpy.array([1.0, 1024.0, 65536.0]),
    decode_itl=numpy.full((3, 3), step_ms),
)
"""
"""Run in Dynamo's environment: writes the table of times that its mocker reads."""
KV_BLOCKS = 1_000_000
SEQUENCES_MAX = 10_000


@dataclass(frozen=True)
class Dynamo:
    """Dynamo from the package index."""

    environment: Environment
    name: str = "dynamo"

    @contextlib.asynccontextmanager
    async def start(self, around: Surroundings) -> AsyncIterator[Running]:
        """Mockers of both roles, frontend."""
        if not isolation.is_isolated():
            raise StartError("Dynamo listens on all addresses: it is measured in a network of its own only")
        port = free_port()
        python = str(self.environment.python(self.name))
        environment = self._settings(around)
        command = [python, "-m", "dynamo.frontend", "--router-mode=round-robin", "--discovery-backend=file"]
        command += [f"--http-host={HOST}", f"--http-port={port}"]
        async with contextlib.AsyncExitStack() as stack:
            workers = []
            for role, count in (("prefill", around.prefill), ("decode", around.decode)):
                mocker = Program(f"dynamo-{role}", self._mocker(role, count, around), around.logs, environment)
                workers.append(await stack.enter_async_context(running(mocker)))
            frontend = Program("dynamo-frontend", command, around.logs, environment)
            await stack.enter_async_context(running(frontend))
            await wait_listening(frontend, port)
            parts = Parts([frontend.pid], [], [worker.pid for worker in workers])
            label = f"Dynamo {self.environment.version(self.name)} PD round robin"
            yield Running([Door(label, "http", [f"{HOST}:{port}"], parts, {"counts_events": True})], None)

    def _settings(self, around: Surroundings) -> dict[str, str]:
        own = {
            "DYN_FILE_KV": str(around.logs / "discovery"),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_LOG": "warn",
            "HF_HUB_OFFLINE": "1",
        }
        return {**os.environ, **own}

    def _mocker(self, role: str, count: int, around: Surroundings) -> list[str]:
        command = [str(self.environment.python(self.name)), "-m", "dynamo.mocker"]
        command += [f"--model-path={around.model}", f"--model-name={around.model_name}", f"--num-workers={count}"]
        command += [f"--disaggregation-mode={role}", "--kv-transfer-bandwidth=0", "--discovery-backend=file"]
        command += [f"--num-gpu-blocks-override={KV_BLOCKS}", f"--max-num-seqs={SEQUENCES_MAX}"]
        if around.pace.token_s == 0:
            return [*command, "--speedup-ratio=0"]
        return [*command, f"--planner-profile-data={self._times(around)}"]

    def _times(self, around: Surroundings) -> Path:
        file = around.logs / "times.npz"
        if not file.exists():
            step_ms = 1e3 * around.pace.token_s
            python = self.environment.python(self.name)
            subprocess.run([python, "-c", TIMES, str(file), str(step_ms)], check=True)
        return file
