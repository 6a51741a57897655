"""SGLang's output parsers for the frontend: one stream per request, in a host process that is restarted when it dies.

Owns the host's restarts and the stream ids. When the host dies, each of its streams fails with one ParserFailed; new
streams wait for the next host.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem.domain.generation import Guided
from tandem.errors import ParserFailed, StartError
from tandem.output_parsers import deltas
from tandem.output_parsers.deltas import Delta
from tandem.output_parsers.host_process import ParserProcess

log = logging.getLogger(__name__)

ToolChoice = str | Mapping[str, Any]
"""As OpenAI writes it: "none", "auto", "required", or {"type": "function", "function": {"name": ...}}."""
PROMPT_TAIL_CHARS = 1_024
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
        self._host: ParserProcess | None = None
        self._ready = asyncio.Event()
        self._restart_task: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """Process id of the host; None while no host is ready."""
        return self._host.pid if self._host is not None and self._ready.is_set() else None

    async def start(self) -> None:
        """Return when the host is ready.

        Raises:
            ConfigError: SGLang has no parser of that name.
            StartError: SGLang is not installed, or its parsers cannot be used.
        """
        self._host = await ParserProcess.start(self._flags)
        self._ready.set()
        self._restart_task = asyncio.create_task(self._restart_when_ended())

    async def stop(self) -> None:
        """End the host. Safe after a failed start, and when called twice."""
        if self._restart_task is not None:
            self._restart_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restart_task
            self._restart_task = None
        self._ready.clear()
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
    ) -> ParsedStream:
        """Open a stream for one request's output.

        Args:
            tools: as OpenAI's `tools`; empty: only reasoning is parsed.
            tool_choice: with "required" or a named tool, the engine must be given the grammar of `constraint`.
            prompt: rendered prompt; its end shows whether the output starts inside a reasoning block.
            template_kwargs: the request's chat template arguments, which some parsers depend on.
            previous_calls: number of tool calls in the messages; some models continue that count in their call ids.

        Raises:
            InvalidRequest: a tool or the tool choice is invalid.
            ParserFailed: no host is ready within READY_TIMEOUT_S.
        """
        stream_id = next(self._ids)
        message = _wanted(tools, tool_choice, prompt, template_kwargs) | {"previous_calls": previous_calls}
        host, response = await self._call({"op": "open", "id": stream_id, **message})
        return ParsedStream(host, stream_id, keep_special_tokens=response["keep_special_tokens"])

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
            ParserFailed: no host is ready, or SGLang cannot build a grammar for these tools.
        """
        if tool_choice == "none" or (not tools and tool_choice == "auto"):
            return None
        message = _wanted(tools, tool_choice, prompt, template_kwargs) | {"parallel": parallel_tool_calls}
        grammar = (await self._call({"op": "grammar", **message}))[1]["grammar"]
        return None if grammar is None else Guided(**{grammar["kind"]: grammar["grammar"]})

    async def open_count(self) -> int:
        """Number of open streams in the host."""
        count: int = (await self._call({"op": "count"}))[1]["streams"]
        return count

    async def _call(self, message: Mapping[str, Any]) -> tuple[ParserProcess, dict[str, Any]]:
        """Send a message that depends on no open stream; returns the host that responded, and its response."""
        host = await self._get_host()
        try:
            return host, await host.call(message)
        except ParserFailed:
            if not host.has_ended:
                raise
            # Retry on the next host: the message needs no state of the one that died.
            host = await self._get_host()
            return host, await host.call(message)
        except asyncio.CancelledError:
            if "id" in message:
                host.send({"op": "forget", "id": message["id"]})
            raise

    async def _get_host(self) -> ParserProcess:
        if self._host is not None and self._host.has_ended:
            # The restart task has not noticed yet: wait for the next host instead of using this one.
            self._ready.clear()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise ParserFailed(f"the parser host ended and no other was ready within {READY_TIMEOUT_S:g} s") from None
        assert self._host is not None, "ready without a host"
        return self._host

    async def _restart_when_ended(self) -> None:
        """Start another host whenever one ends."""
        while True:
            assert self._host is not None, "restart task before start()"
            status = await self._host.wait_ended()
            self._ready.clear()
            log.error("parser host exited with status %d: its streams failed; starting another", status)
            while not self._ready.is_set():
                try:
                    self._host = await ParserProcess.start(self._flags)
                    self._ready.set()
                except StartError as problem:
                    log.error("parser host failed to start, retrying in %g s: %s", RESTART_DELAY_S, problem)
                    await asyncio.sleep(RESTART_DELAY_S)


class ParsedStream:
    """One request's output stream. Leaving its context before `close` abandons it."""

    def __init__(self, host: ParserProcess, stream_id: int, *, keep_special_tokens: bool) -> None:
        self._host = host
        self._id = stream_id
        self._is_open = True
        self.keep_special_tokens = keep_special_tokens
        """Whether to detokenize with special tokens, because the format's markers are special tokens."""

    async def __aenter__(self) -> ParsedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    async def feed(self, text: str) -> list[Delta]:
        """Parse the next text of the model; returns the deltas that are final now.

        Raises:
            ParserFailed: the host has died, or its parser failed on this text.
        """
        assert self._is_open, "feed() after the end"
        if not text:
            return []
        return deltas.read((await self._host.call({"op": "feed", "id": self._id, "text": text}))["deltas"])

    async def close(self, *, complete: bool = True) -> list[Delta]:
        """End the model's output; returns the deltas that were held back.

        Args:
            complete: the model ended by itself. False: the output was cut off, perhaps in the middle of a call.

        Raises:
            ParserFailed: as `feed`.
        """
        assert self._is_open, "close() after the end"
        self._is_open = False
        return deltas.read((await self._host.call({"op": "close", "id": self._id, "complete": complete}))["deltas"])

    def abandon(self) -> None:
        """Discard the rest of the output. Safe after the end."""
        if self._is_open:
            self._is_open = False
            self._host.send({"op": "forget", "id": self._id})


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
