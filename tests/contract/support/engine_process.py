"""The test's end of an engine host: an engine in another process, with the methods of the port.

Owns the process: `close` ends it and everything it started, whatever state it is in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tandem
from tandem.domain.generation import EngineFinish, EngineRequest, TokenBatch, TokenLogprob
from tandem.domain.worker import Capabilities, EngineLoad, WorkerRole
from tandem.engine.port import BootstrapAddress, KvEvent, KvSnapshot
from tandem.engine.settings import EngineSettings

HOST = Path(__file__).with_name("engine_host.py")
HOST_DIED: tuple[str, tuple[str, str, dict[str, str]]] = ("error", ("HostDied", "the engine's process ended", {}))


class RemoteError(Exception):
    """What the engine raised in its process."""

    def __init__(self, name: str, message: str, metadata: dict[str, str]) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.metadata = metadata


@dataclass
class Result:
    """A whole generation, as collected."""

    batches: list[TokenBatch] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [t for batch in self.batches for t in batch.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [p for batch in self.batches for p in batch.logprobs]

    @property
    def finishes(self) -> list[EngineFinish]:
        return [batch.finish for batch in self.batches if batch.finish is not None]

    @property
    def finish(self) -> EngineFinish:
        """The one finish; every generation that was collected must have ended with exactly one."""
        assert len(self.finishes) == 1, f"{len(self.finishes)} finishes"
        assert self.batches[-1].finish is not None, "the finish was not in the last batch"
        return self.finishes[0]


class Generation:
    """A generation under way."""

    def __init__(self, engine: EngineProcess, request: EngineRequest, close_after: int | None) -> None:
        self._engine = engine
        self.request = request
        self.number, self._answers = engine.send("generate", request, close_after)
        self.result = Result()

    async def batches(self) -> AsyncIterator[TokenBatch]:
        """Batches as they come; raises RemoteError when the engine raised."""
        while True:
            kind, payload = await self._answers.get()
            if kind == "error":
                raise RemoteError(*payload)
            if kind == "result":
                return
            self.result.batches.append(payload)
            yield payload

    async def tokens(self, count: int) -> None:
        """Wait until so many tokens have come."""
        async for _ in self.batches():
            if len(self.result.token_ids) >= count:
                return
        raise AssertionError(f"the generation ended after {len(self.result.token_ids)} tokens")

    async def all(self) -> Result:
        """Wait for the end."""
        async for _ in self.batches():
            pass
        return self.result

    async def cancel(self) -> bool:
        """Cancel the task that reads this generation in the engine's process."""
        return bool(await self._engine.call("cancel", self.number))


class EngineProcess:
    """One engine in its own process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.capabilities: Capabilities
        self.bootstrap: BootstrapAddress | None = None
        self.idle_load: EngineLoad
        self._next_number = 0
        self._pending: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def spawn(
        cls, name: str, settings: EngineSettings, log: Path, plugin: Mapping[str, str] | None = None
    ) -> EngineProcess:
        """Start the process, not yet the engine. `plugin` is the environment of one that SGLang is to find."""
        source, plugin = str(Path(tandem.__file__).parents[1]), plugin or {}
        # On a GPU machine the packages are named by the variable too.
        paths = filter(None, (plugin.get("PYTHONPATH"), os.environ.get("PYTHONPATH")))
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(HOST),
                name,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **plugin, "PYTHONPATH": os.pathsep.join((source, *paths))},
                start_new_session=True,  # its own group, so that `close` reaches every process the engine started
            )
        engine = cls(process)
        engine._write(settings)
        return engine

    async def start(self) -> None:
        """Start the engine and take down what it says of itself."""
        await self.call("start")
        self.capabilities, self.bootstrap = await self.call("describe")
        self.idle_load = await self.load()

    async def switch_role(self, role: WorkerRole) -> None:
        """Take another role, and take down what it says of itself then."""
        await self.call("switch_role", role)
        self.capabilities, self.bootstrap = await self.call("describe")

    def send(self, name: str, *arguments: Any) -> tuple[int, asyncio.Queue[tuple[str, Any]]]:
        """Begin a command; answers arrive in the queue."""
        self._next_number += 1
        answers: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        if self._reader.done():
            answers.put_nowait(HOST_DIED)
            return self._next_number, answers
        self._pending[self._next_number] = answers
        self._write((self._next_number, name, arguments))
        return self._next_number, answers

    async def call(self, name: str, *arguments: Any) -> Any:
        """Run a command to its end."""
        _, answers = self.send(name, *arguments)
        kind, payload = await answers.get()
        if kind == "error":
            raise RemoteError(*payload)
        return payload

    def generate(self, request: EngineRequest, *, close_after: int | None = None) -> Generation:
        """Begin a generation."""
        return Generation(self, request, close_after)

    async def load(self) -> EngineLoad:
        load: EngineLoad = await self.call("load")
        return load

    async def abort(self, request_id: str) -> bool:
        return bool(await self.call("abort", request_id))

    async def flush_cache(self) -> bool:
        return bool(await self.call("flush_cache"))

    async def stop(self) -> None:
        await self.call("stop")

    async def kv_events(self, from_sequence: int, count: int) -> list[KvEvent]:
        events: list[KvEvent] = await self.call("kv_events", from_sequence, count)
        return events

    async def kv_cache(self) -> set[int]:
        """The blocks that the mirror holds, which must be known."""
        found = await self.call("kv_cache")
        assert isinstance(found, KvSnapshot), found
        return set(found.block_hashes)

    async def read_kv_cache(self) -> set[int]:
        """The blocks that the engine itself has."""
        found: KvSnapshot = await self.call("read_kv_cache")
        assert len(set(found.block_hashes)) == len(found.block_hashes)
        return set(found.block_hashes)

    async def children(self) -> list[tuple[int, str]]:
        children: list[tuple[int, str]] = await self.call("children")
        return children

    async def close(self) -> None:
        """Stop the engine if it still answers, then end its whole process group."""
        if self.process.returncode is None:
            with contextlib.suppress(TimeoutError, RemoteError, OSError):
                async with asyncio.timeout(15):
                    await self.stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        await self._reader

    def _write(self, item: Any) -> None:
        frame = pickle.dumps(item)
        assert self.process.stdin is not None
        self.process.stdin.write(len(frame).to_bytes(4, "little") + frame)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                size_bytes = int.from_bytes(await self.process.stdout.readexactly(4), "little")
                number, kind, payload = pickle.loads(await self.process.stdout.readexactly(size_bytes))
                self._pending[number].put_nowait((kind, payload))
                if kind != "batch":
                    del self._pending[number]
        except (asyncio.IncompleteReadError, ConnectionError):
            for answers in self._pending.values():
                answers.put_nowait(HOST_DIED)
