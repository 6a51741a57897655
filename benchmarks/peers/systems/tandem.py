"""Tandem: a real registry, frontend and edge of this or another checkout, before fake workers.

Owns their start from a checkout's own code. The workers are always this checkout's, whichever contract they speak.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.children import HOST, Program, own_python, running
from benchmarks.peers.clocks import Parts
from benchmarks.peers.environment import REPOSITORY
from benchmarks.peers.systems.door import Door, Running, Surroundings, fleet

SERVICES = ("frontend", "prefill", "decode", "registry", "edge")
EDGE_MODULES = {"services/edge/tandem_edge": "tandem_edge", "src/tandem/edge": "tandem_edge"}
ROOM = 64
"""Requests more than the streams that are to be open: probes, and what comes again at once."""
OPEN_REQUESTS_MIN = 256


def contract_of(root: Path) -> int:
    """The leg contract that a checkout's frontend speaks."""
    return 2 if (root / "protos" / "tandem" / "api" / "worker" / "v2").is_dir() else 1


@dataclass(frozen=True)
class Tandem:
    """Tandem of one checkout."""

    name: str
    root: Path = REPOSITORY
    contract: int = 2
    frontend_flags: Sequence[str] = ()
    doors: Sequence[str] = ("grpc", "http")
    coalescing: Sequence[int | None] = (None,)
    """What gRPC clients ask for, one after the other; None: nothing."""

    @contextlib.asynccontextmanager
    async def start(self, around: Surroundings) -> AsyncIterator[Running]:
        """Registry, workers, frontend, edge."""
        async with contextlib.AsyncExitStack() as stack:
            registry = await self._serve(stack, "registry", "tandem_registry", around, [])
            address = await registry
            workers = await stack.enter_async_context(fleet(f"contract{self.contract}", around, registry=address))
            open_max = str(max(OPEN_REQUESTS_MIN, around.streams_max + ROOM))
            flags = [f"--registry={address}", f"--model={around.model}", f"--open-requests-max={open_max}"]
            flags.append("--tenant-share=1")  # all of the load is one client's
            frontend = await self._serve(stack, "frontend", "tandem_frontend", around, [*flags, *self.frontend_flags])
            grpc_address = await frontend
            parts = Parts([frontend.pid], [], [workers.helper.pid])
            doors = [] if "grpc" not in self.doors else self._grpc_doors(grpc_address, parts)
            if "http" in self.doors:
                edge = await self._serve(
                    stack,
                    "edge",
                    self._edge_module(),
                    around,
                    [f"--registry={address}", f"--open-requests-max={max(4096, int(open_max))}"],
                )
                http_address = await edge
                with_proxy = Parts([frontend.pid], [edge.pid], [workers.helper.pid])
                doors.append(Door(f"{self.name} HTTP", "http", [http_address], with_proxy))
            yield Running(doors, workers.helper)

    def _grpc_doors(self, address: str, parts: Parts) -> list[Door]:
        doors = []
        for coalesce_ms in self.coalescing:
            label = f"{self.name} gRPC"
            if coalesce_ms is not None:
                label += ", coalescing off" if coalesce_ms == 0 else f", coalescing {coalesce_ms} ms"
            doors.append(Door(label, "grpc", [address], parts, {"coalesce_ms": coalesce_ms}))
        return doors

    def _edge_module(self) -> str:
        return next(module for folder, module in EDGE_MODULES.items() if (self.root / folder).is_dir())

    async def _serve(
        self, stack: contextlib.AsyncExitStack, role: str, module: str, around: Surroundings, flags: Sequence[str]
    ) -> _Service:
        """Start a service of the checkout."""
        name = f"{self.name}-{role}".replace(" ", "-")
        file = around.logs / f"{name}.announce.json"
        file.unlink(missing_ok=True)
        own = [f"--host={HOST}", "--port=0", f"--announce-file={file}", "--log-format=text", "--drain-timeout-s=1"]
        command = [str(own_python()), "-m", module, *own, *flags]
        program = Program(name, command, around.logs, self._environment())
        return _Service(await stack.enter_async_context(running(program)), file)

    def _environment(self) -> dict[str, str]:
        folders = [self.root / "src", *(self.root / "services" / service for service in SERVICES)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


@dataclass(frozen=True)
class _Service:
    """A service that has been started; awaiting it gives its address once it serves."""

    program: Program
    file: Path

    @property
    def pid(self) -> int:
        return self.program.pid

    def __await__(self):  # type: ignore[no-untyped-def]
        return self.program.wait_announced(self.file).__await__()
