"""A child process that hosts one engine: so that two legs live in two processes, and killing one never kills pytest.

Reads pickled commands from stdin and writes pickled answers to what was stdout, each frame behind its 4-byte length.
Run by `engine_process.EngineProcess`; knows nothing of tests.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import psutil

from tandem.domain.generation import EngineRequest
from tandem.engine.factory import create_engine
from tandem.engine.port import Engine, KvEvent, KvSnapshot, KvUnknown
from tandem.engine.pulling import generate
from tandem.engine.settings import EngineSettings
from tandem.errors import TandemError

Answer = tuple[int, str, Any]
"""Number of the command, kind ("batch", "result" or "error"), payload."""


class Host:
    """Runs commands on one engine, each in its own task."""

    def __init__(self, engine: Engine, answer: Callable[[Answer], None]) -> None:
        self._engine = engine
        self._answer = answer
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._commands: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
            "start": self._engine.start,
            "stop": self._engine.stop,
            "switch_role": self._engine.switch_role,
            "load_adapter": self._engine.load_adapter,
            "unload_adapter": self._engine.unload_adapter,
            "abort": self._abort,
            "load": self._engine.load,
            "canary": self._engine.canary,
            "flush_cache": self._engine.flush_cache,
            "wait_failed": self._engine.wait_failed,
            "describe": self._describe,
            "kv_events": self._kv_events,
            "kv_cache": self._kv_cache,
            "kv_sequence": self._kv_sequence,
            "drop_kv_messages": self._drop_kv_messages,
            "read_kv_cache": self._engine.read_kv_cache,
            "children": self._children,
            "cancel": self._cancel,
        }

    def take(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        """Begin a command; its answers come by its number."""
        work = self._generate(number, *arguments) if name == "generate" else self._commands[name](*arguments)
        task = asyncio.create_task(self._run(number, work))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _run(self, number: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._answer((number, "result", await work))
        except TandemError as problem:
            self._answer((number, "error", (type(problem).__name__, problem.message, problem.metadata)))
        except asyncio.CancelledError:
            self._answer((number, "error", ("CancelledError", "cancelled", {})))
        except Exception as problem:
            self._answer((number, "error", (type(problem).__name__, repr(problem), {})))

    async def _generate(self, number: int, request: EngineRequest, close_after: int | None) -> None:
        """Pass every batch on; with `close_after`, close the iterator once so many batches came."""
        batches = generate(self._engine, request)
        count = 0
        async for batch in batches:
            self._answer((number, "batch", batch))
            count += 1
            if count == close_after:
                await batches.aclose()
                return

    async def _abort(self, request_id: str) -> bool:
        return self._engine.abort(request_id)

    async def _describe(self) -> tuple[Any, Any]:
        return self._engine.capabilities(), self._engine.bootstrap_address()

    async def _kv_events(self, from_sequence: int, count: int) -> list[KvEvent]:
        events: list[KvEvent] = []
        async for event in self._engine.kv_cache().events(from_sequence):
            events.append(event)
            if len(events) == count:
                break
        return events

    async def _kv_sequence(self) -> int:
        """Number of the last event, after all that the engine has published."""
        await self._engine.read_kv_cache()
        return (await self._kv_cache()).sequence

    async def _drop_kv_messages(self, count: int, replays: bool) -> None:
        """SGLang: lose the next messages, as its event socket may; without `replays`, its replay socket has none."""
        follower: Any = self._engine._kv_follower  # type: ignore[attr-defined]
        left = itertools.count(count, -1)

        async def take(sequence: int, payload: bytes) -> None:
            if next(left) <= 0:
                await type(follower)._take(follower, sequence, payload)

        async def replay() -> AsyncGenerator[tuple[int, bytes]]:
            return
            yield

        follower.__dict__.pop("_replay", None)
        follower._take = take
        if not replays:
            follower._replay = replay

    async def _kv_cache(self) -> KvSnapshot | KvUnknown:
        """What the mirror holds now."""
        async for update in self._engine.kv_cache().follow():
            assert not isinstance(update, KvEvent)
            return update
        raise AssertionError("following a cache ended")

    async def _children(self) -> list[tuple[int, str]]:
        return [(child.pid, child.name()) for child in psutil.Process().children(recursive=True)]

    async def _cancel(self, number: int) -> bool:
        """Cancel the task that reads a generation, as a worker does when its client goes away."""
        task = self._tasks.get(number)
        return task is not None and task.cancel()


async def main(name: str, answers_fd: int) -> None:
    """Serve commands until stdin ends."""
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)

    def answer(item: Answer) -> None:
        frame = pickle.dumps(item)
        # A pipe takes a big frame in pieces; the parent always reads, so this cannot block for long.
        left = memoryview(len(frame).to_bytes(4, "little") + frame)
        while left:
            left = left[os.write(answers_fd, left) :]

    settings: EngineSettings = await _read_frame(stdin)
    host = Host(create_engine(name, settings), answer)
    while True:
        try:
            number, command, arguments = await _read_frame(stdin)
        except asyncio.IncompleteReadError:
            return
        host.take(number, command, arguments)


async def _read_frame(stream: asyncio.StreamReader) -> Any:
    size_bytes = int.from_bytes(await stream.readexactly(4), "little")
    return pickle.loads(await stream.readexactly(size_bytes))


if __name__ == "__main__":
    # Engines print: keep the real stdout for answers and send everything else to stderr.
    answers = os.dup(1)
    os.dup2(2, 1)
    asyncio.run(main(sys.argv[1], answers))
