"""A parser worker's loop: one JSON object per line in, one per line out, in order.

Owns the open streams, their bounds, and the operations of the protocol. A failure in one stream becomes an error
response for that stream. The client sends `forget` for a stream it abandons; the process exits at the end of its input.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice

from tandem.engine.sglang.parsing.bounds import (
    CHAR_CPU_S,
    REQUEST_CPU_S,
    STEP_CPU_S,
    STREAM_CPU_S,
    TEXT_CHARS_MAX,
    BoundExceeded,
    StepTimer,
)
from tandem.engine.sglang.parsing.stream import Formats, Stream, Wanted
from tandem.engine.sglang.parsing.tool_text import Delta
from tandem.errors import InvalidRequest

log = logging.getLogger(__name__)

STREAMS_MAX = 8_192
Message = dict[str, Any]


class Host:
    """Handles messages."""

    def __init__(self, formats: Formats) -> None:
        self._formats = formats
        self._timer = StepTimer()
        self._streams: dict[int, BoundedStream] = {}
        self._operations: dict[str, Callable[[Message], Message]] = {
            "open": self._open,
            "feed": self._feed,
            "close": self._close,
            "forget": self._forget,
            "grammar": self._grammar,
            "count": self._count,
        }

    def serve(self, lines: Iterable[str], write: Callable[[str], object]) -> None:
        """Respond to each line until the input ends. A message with number 0 gets no response."""
        for line in lines:
            message = json.loads(line)
            response = self.handle(message)
            if message["n"]:
                # ASCII only, so that no response can be one that cannot be encoded.
                write(json.dumps({"n": message["n"], **response}) + "\n")

    def handle(self, message: Message) -> Message:
        """The response to one message; on failure it has `error`, and `field` if the request is at fault."""
        try:
            return self._operations[message["op"]](message)
        except InvalidRequest as problem:
            self._streams.pop(message.get("id", 0), None)
            return {"error": problem.message.removeprefix(f"{problem.field}: "), "field": problem.field}
        except BoundExceeded as problem:
            self._streams.pop(message.get("id", 0), None)
            log.warning("stream %s is closed: %s", message.get("id"), problem)
            return {"error": str(problem)}
        except Exception as problem:  # an exception in a detector must not end the other streams
            log.exception(
                "operation %s failed: the request of stream %s fails, others are not affected",
                message.get("op"),
                message.get("id"),
            )
            self._streams.pop(message.get("id", 0), None)
            return {"error": f"{type(problem).__name__}: {problem}"}

    def _open(self, message: Message) -> Message:
        if len(self._streams) >= STREAMS_MAX:
            return {"error": f"the limit of {STREAMS_MAX} open streams is reached"}
        opened, _ = self._timer.run(lambda: self._formats.open(wanted(message)), REQUEST_CPU_S)
        stream = BoundedStream(opened, self._timer)
        stream.replay(message.get("replay", ()))
        self._streams[message["id"]] = stream
        return {"keep_special_tokens": stream.keep_special_tokens}

    def _feed(self, message: Message) -> Message:
        return {"deltas": self._streams[message["id"]].feed(message["text"])}

    def _close(self, message: Message) -> Message:
        return {"deltas": self._streams.pop(message["id"]).close(complete=message["complete"])}

    def _forget(self, message: Message) -> Message:
        self._streams.pop(message["id"], None)
        return {}

    def _grammar(self, message: Message) -> Message:
        return {"grammar": self._timer.run(lambda: self._formats.grammar(wanted(message)), REQUEST_CPU_S)[0]}

    def _count(self, message: Message) -> Message:
        return {"streams": len(self._streams)}


class BoundedStream:
    """One stream with what it has used of its bounds."""

    def __init__(self, stream: Stream, timer: StepTimer) -> None:
        self._stream = stream
        self._timer = timer
        self._used_s = 0.0
        self._chars = 0
        self.keep_special_tokens = stream.keep_special_tokens

    def replay(self, texts: Sequence[str]) -> None:
        """Parse again what another process parsed; its deltas were sent already.

        Raises:
            BoundExceeded: as `feed`.
        """
        for text in texts:
            self.feed(text)

    def feed(self, text: str) -> list[Delta]:
        """The deltas of the next text.

        Raises:
            BoundExceeded: it took too much time, or the stream has too much text.
        """
        self._chars += len(text)
        if self._chars > TEXT_CHARS_MAX:
            raise BoundExceeded(f"the output has more than {TEXT_CHARS_MAX} characters")
        return self._step(lambda: self._stream.feed(text), len(text))

    def close(self, *, complete: bool) -> list[Delta]:
        """The remaining deltas.

        Raises:
            BoundExceeded: as `feed`.
        """
        return self._step(lambda: self._stream.close(complete=complete), self._chars)

    def _step(self, work: Callable[[], list[Delta]], chars: int) -> list[Delta]:
        left_s = STREAM_CPU_S + self._chars * CHAR_CPU_S - self._used_s
        deltas, used_s = self._timer.run(work, min(STEP_CPU_S + chars * CHAR_CPU_S, left_s))
        self._used_s += used_s
        return deltas


def wanted(message: Message) -> Wanted:
    """Check a message's tools and tool choice, and convert them.

    Raises:
        InvalidRequest: names the tool or the tool choice at fault.
    """
    tools = [_tool(number, tool) for number, tool in enumerate(message["tools"])]
    choice: str | ToolChoice = message["tool_choice"]
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise InvalidRequest("tool_choice", f"names {name!r}, which is not in tools")
        choice = ToolChoice(function={"name": name})
    elif choice not in ("none", "auto", "required"):
        raise InvalidRequest("tool_choice", f"must be none, auto, required or a function, not {choice!r}")
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice", "is required, but tools is empty")
    return Wanted(
        tools=[] if choice == "none" else tools,
        tool_choice=choice,
        prompt=message["prompt"],
        template_kwargs=message["template_kwargs"],
        previous_calls=message["previous_calls"],
        parallel=message["parallel"],
        answers_at_once=message.get("answers_at_once", False),
    )


def _tool(number: int, tool: Any) -> Tool:
    try:
        checked = Tool.model_validate(tool)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise InvalidRequest(f"tools[{number}]{where}", first["msg"]) from None
    if not checked.function.name:
        raise InvalidRequest(f"tools[{number}].function.name", "is required")
    return checked
