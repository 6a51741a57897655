"""SGLang's output parsers for the frontend: one stream per request, in one of a few worker processes.

Owns the workers and the host that forks them, their replacement, and the stream ids. When a worker ends, its streams
continue in another one from their own text so far; only a stream that ended it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.domain.generation import Guided
from tandem.errors import ParserFailed, ServiceError, StartError
from tandem.output_parsers.host_process import HostProcess
from tandem.output_parsers.parsed_stream import ENDS_MAX, ParsedStream
from tandem.output_parsers.worker_connection import WorkerConnection, WorkerEnded

log = logging.getLogger(__name__)

ToolChoice = str | Mapping[str, Any]
"""As OpenAI writes it: "none", "auto", "required", or {"type": "function", "function": {"name": ...}}."""
PROMPT_TAIL_CHARS = 1_024
WORKERS = 2
"""One parses, as long as it keeps up: messages of all streams then wake one process. The others take over."""
BUSY_S = 0.05
"""A worker that works longer on one message gets no new streams until it has answered."""
READY_TIMEOUT_S = 60.0
"""How long a request waits for the host to be restarted."""
RESTART_DELAY_S = 1.0


class Parsers:
    """The parsers of one model. With neither parser named, the whole output is content."""

    def __init__(self, model: Path, *, tool_parser: str | None, reasoning_parser: str | None) -> None:
        self.tool_parser = tool_parser
        self.reasoning_parser = reasoning_parser
        self._flags = [f"--model={model}"]
        if tool_parser is not None:
            self._flags.append(f"--tool-parser={tool_parser}")
        if reasoning_parser is not None:
            self._flags.append(f"--reasoning-parser={reasoning_parser}")
        self._host: HostProcess | None = None
        self._workers: list[WorkerConnection] = []
        """Those that can take streams."""
        self._ready = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """Process id of the host; None while no host is ready."""
        return self._host.pid if self._host is not None and not self._host.has_ended else None

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [worker.pid for worker in self._live() if worker.pid is not None]

    async def start(self) -> None:
        """Return when the host is ready.

        Raises:
            ConfigError: SGLang has no parser of that name.
            StartError: SGLang is not installed, or its parsers cannot be used.
        """
        self._host = await HostProcess.start(self._flags)
        for _ in range(WORKERS):
            self._add(await self._host.start_worker())
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the host and its workers. Safe after a failed start, and when called twice."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._running = None
        self._ready.clear()
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        if self._host is not None:
            await self._host.stop()
            self._host = None

    async def open(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        tool_choice: ToolChoice = "auto",
        prompt: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
        previous_calls: int = 0,
        answers_at_once: bool = False,
    ) -> ParsedStream:
        """Open a stream for one request's output.

        Args:
            tools: as OpenAI's `tools`; empty: only reasoning is parsed.
            tool_choice: with "required" or a named tool, the engine must be given the grammar of `constraint`.
            prompt: rendered prompt; its end shows whether the output starts inside a reasoning block.
            template_kwargs: the request's chat template arguments, which some parsers depend on.
            previous_calls: number of tool calls in the messages; some models continue that count in their call ids.
            answers_at_once: the client's own grammar begins at the first token, so no reasoning precedes it.

        Raises:
            InvalidRequest: a tool or the tool choice is invalid.
            ParserFailed: the parsers of these tools cannot be built.
            ServiceError: no worker is ready within READY_TIMEOUT_S.
        """
        wanted = _wanted(tools, tool_choice, prompt, template_kwargs)
        wanted |= {"previous_calls": previous_calls, "answers_at_once": answers_at_once}
        stream = ParsedStream(self.worker, next(self._ids), wanted)
        await stream.open()
        return stream

    async def constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: ToolChoice,
        *,
        parallel_tool_calls: bool = True,
        prompt: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Guided | None:
        """The grammar that SGLang's own server would constrain the output with; None: unconstrained.

        Raises:
            InvalidRequest: a tool or the tool choice is invalid.
            ParserFailed: SGLang cannot build a grammar for these tools.
            ServiceError: no worker is ready within READY_TIMEOUT_S.
        """
        if tool_choice == "none" or (not tools and tool_choice == "auto"):
            return None
        message = _wanted(tools, tool_choice, prompt, template_kwargs) | {"parallel": parallel_tool_calls}
        ends = 0
        while True:
            worker = await self.worker()
            try:
                grammar = (await worker.call({"op": "grammar", **message}))["grammar"]
            except WorkerEnded as end:
                ends += end.was_at_work
                if end.was_at_work and (end.did_not_respond or ends > ENDS_MAX):
                    raise ParserFailed(f"the grammar of these tools could not be built: {end}") from None
                continue
            return None if grammar is None else Guided(**{grammar["kind"]: grammar["grammar"]})

    async def open_count(self) -> int:
        """Number of open streams in the workers."""
        responses = await asyncio.gather(*(worker.call({"op": "count"}) for worker in self._live()))
        return sum(response["streams"] for response in responses)

    async def worker(self) -> WorkerConnection:
        """The first worker that is not held up; waits for one if there is none.

        Raises:
            ServiceError: none is ready within READY_TIMEOUT_S.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not self._live():
                    self._ready.clear()
                    await self._ready.wait()
        except TimeoutError:
            raise ServiceError(f"the parser host ended and no other was ready within {READY_TIMEOUT_S:g} s") from None
        live = self._live()
        return next((worker for worker in live if worker.busy_s < BUSY_S), min(live, key=lambda worker: worker.busy_s))

    def _live(self) -> list[WorkerConnection]:
        return [worker for worker in self._workers if not worker.has_ended]

    def _add(self, worker: WorkerConnection) -> None:
        self._workers.append(worker)
        self._ready.set()

    async def _run(self) -> None:
        """Replace workers and the host whenever they end."""
        keepers: set[asyncio.Task[None]] = {asyncio.create_task(self._keep(worker)) for worker in self._workers}
        try:
            while True:
                assert self._host is not None, "run before start()"
                status = await self._host.wait_ended()
                log.error("parser host exited with status %d: starting another", status)
                # Its workers end with it.
                await asyncio.gather(*keepers, return_exceptions=True)
                await self._host.stop()
                self._host = await self._started_again()
                keepers = {asyncio.create_task(self._keep(None)) for _ in range(WORKERS)}
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _started_again(self) -> HostProcess:
        while True:
            try:
                return await HostProcess.start(self._flags)
            except StartError as problem:
                log.error("parser host failed to start, retrying in %g s: %s", RESTART_DELAY_S, problem)
                await asyncio.sleep(RESTART_DELAY_S)

    async def _keep(self, worker: WorkerConnection | None) -> None:
        """Keep one worker until the host ends."""
        host = self._host
        assert host is not None, "keepers run while there is a host"
        while True:
            if worker is None:
                try:
                    worker = await host.start_worker()
                except StartError as problem:
                    if not host.has_ended:
                        log.error("no parser worker started, retrying in %g s: %s", RESTART_DELAY_S, problem)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(RESTART_DELAY_S):
                            await host.wait_ended()
                            return
                    continue
                self._add(worker)
            was_stuck = await worker.wait_ended()
            self._workers.remove(worker)
            reason = "was killed because it did not respond" if was_stuck else "ended"
            log.error("parser worker %s %s: its streams continue in others", worker.pid, reason)
            worker = None


def _wanted(
    tools: Sequence[Mapping[str, Any]], tool_choice: ToolChoice, prompt: str, template_kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "tools": list(tools),
        "tool_choice": tool_choice,
        "prompt": prompt[-PROMPT_TAIL_CHARS:],
        "template_kwargs": dict(template_kwargs or {}),
        "previous_calls": 0,
        "parallel": True,
    }
