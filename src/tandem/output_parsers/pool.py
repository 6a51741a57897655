"""SGLang's parsers as the frontend sees them: a stream for each request, in a host process that is kept alive.

Owns the host's restarts and the ids of streams. A host that dies takes the streams that run in it along, each with one
ParserFailed; the next stream waits for the next host.
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
"""How long a request waits for a host that is being started again."""
RESTART_PAUSE_S = 1.0


class Parsers:
    """The parsers of one model. Neither name: every stream is content."""

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
        self._keeping: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)

    @property
    def pid(self) -> int | None:
        """Of the host that runs; None while none is ready."""
        return self._host.pid if self._host is not None and self._ready.is_set() else None

    async def start(self) -> None:
        """Return when the host is ready.

        Raises:
            ConfigError: SGLang has no parser of that name.
            StartError: SGLang is not installed, or its parsers cannot be used.
        """
        self._host = await ParserProcess.start(self._flags)
        self._ready.set()
        self._keeping = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the host. Harmless after a failed start, and twice."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
            self._keeping = None
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
        """A stream for one request's output.

        Args:
            tools: as OpenAI's `tools`; none: only reasoning is parsed.
            tool_choice: with "required" or a named tool the output is held to the grammar that `constraint` gives.
            prompt: as rendered; its end tells whether the model begins inside a block of reasoning.
            template_kwargs: what the request gave to the chat template; some parsers look at it.
            previous_calls: tool calls in the messages; some models count on in their ids.

        Raises:
            InvalidRequest: a tool or the choice is wrong.
            ParserFailed: there is no host.
        """
        stream_id = next(self._ids)
        message = _wanted(tools, tool_choice, prompt, template_kwargs) | {"previous_calls": previous_calls}
        host, answer = await self._ask({"op": "open", "id": stream_id, **message})
        return ParsedStream(host, stream_id, keep_special_tokens=answer["keep_special_tokens"])

    async def constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: ToolChoice,
        *,
        parallel_tool_calls: bool = True,
        prompt: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Guided | None:
        """The grammar SGLang's own server would hold the engine to; None: none.

        Raises:
            InvalidRequest: a tool or the choice is wrong.
            ParserFailed: there is no host, or SGLang cannot make a grammar of these tools.
        """
        if tool_choice == "none" or (not tools and tool_choice == "auto"):
            return None
        message = _wanted(tools, tool_choice, prompt, template_kwargs) | {"parallel": parallel_tool_calls}
        grammar = (await self._ask({"op": "grammar", **message}))[1]["grammar"]
        return None if grammar is None else Guided(**{grammar["kind"]: grammar["grammar"]})

    async def open_count(self) -> int:
        """Streams that the host holds."""
        count: int = (await self._ask({"op": "count"}))[1]["streams"]
        return count

    async def _ask(self, message: Mapping[str, Any]) -> tuple[ParserProcess, dict[str, Any]]:
        """The answer to a message that begins something, and who gave it."""
        host = await self._get_host()
        try:
            return host, await host.ask(message)
        except ParserFailed:
            if not host.has_ended:
                raise
            # Nothing was lost with it: the next one can be asked as well.
            host = await self._get_host()
            return host, await host.ask(message)
        except asyncio.CancelledError:
            if "id" in message:
                host.tell({"op": "forget", "id": message["id"]})
            raise

    async def _get_host(self) -> ParserProcess:
        if self._host is not None and self._host.has_ended:
            # Its keeper is about to notice.
            self._ready.clear()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise ParserFailed("the parser host has ended and is not ready again") from None
        assert self._host is not None, "ready without a host"
        return self._host

    async def _keep(self) -> None:
        """Start the next host when one has ended."""
        while True:
            assert self._host is not None, "kept before it was started"
            status = await self._host.wait_ended()
            self._ready.clear()
            log.error("the parser host has ended (status %d): starting another", status)
            while not self._ready.is_set():
                try:
                    self._host = await ParserProcess.start(self._flags)
                    self._ready.set()
                except StartError as problem:
                    log.error("the parser host does not start: %s", problem)
                    await asyncio.sleep(RESTART_PAUSE_S)


class ParsedStream:
    """One request's output. Leaving its context before `close` abandons it."""

    def __init__(self, host: ParserProcess, stream_id: int, *, keep_special_tokens: bool) -> None:
        self._host = host
        self._id = stream_id
        self._is_open = True
        self.keep_special_tokens = keep_special_tokens
        """Whether the text must be made with special tokens in it, because the format's markers are such tokens."""

    async def __aenter__(self) -> ParsedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    async def feed(self, text: str) -> list[Delta]:
        """What became certain with the next text of the model.

        Raises:
            ParserFailed: the host has died, or its parser failed on this text.
        """
        assert self._is_open, "feed() after the end"
        if not text:
            return []
        return deltas.read((await self._host.ask({"op": "feed", "id": self._id, "text": text}))["deltas"])

    async def close(self, *, complete: bool = True) -> list[Delta]:
        """What was held back, at the end of the model's output.

        Args:
            complete: the model ended by itself. False: it was cut off, and a call may be cut off with it.

        Raises:
            ParserFailed: as `feed`.
        """
        assert self._is_open, "close() after the end"
        self._is_open = False
        return deltas.read((await self._host.ask({"op": "close", "id": self._id, "complete": complete}))["deltas"])

    def abandon(self) -> None:
        """The rest of the output is of no interest. Harmless after the end."""
        if self._is_open:
            self._is_open = False
            self._host.tell({"op": "forget", "id": self._id})


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
