"""The parser host's loop: one JSON object a line in, one a line out, in order.

Owns the streams that are open and what a message means. An exception for one of them answers an error for that one;
whoever abandons a stream says so, and the end of the input is the end of the process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import Tool, ToolChoice

from tandem.engine.sglang.parsing.stream import Formats, Stream, Wanted
from tandem.errors import InvalidRequest

log = logging.getLogger(__name__)

STREAMS_MAX = 8_192
Answer = dict[str, Any]


class Host:
    """Answers messages."""

    def __init__(self, formats: Formats) -> None:
        self._formats = formats
        self._streams: dict[int, Stream] = {}
        self._operations: dict[str, Callable[[Answer], Answer]] = {
            "open": self._open,
            "feed": self._feed,
            "close": self._close,
            "forget": self._forget,
            "grammar": self._grammar,
            "count": self._count,
        }

    def serve(self, lines: Iterable[str], write: Callable[[str], object]) -> None:
        """Answer until the input ends."""
        for line in lines:
            message = json.loads(line)
            answer = self.answer(message)
            if message["n"]:
                write(json.dumps({"n": message["n"], **answer}, ensure_ascii=False) + "\n")

    def answer(self, message: Answer) -> Answer:
        """The answer to one message; `error` in it says what was wrong, `field` whose fault it was."""
        try:
            return self._operations[message["op"]](message)
        except InvalidRequest as problem:
            self._streams.pop(message.get("id", 0), None)
            return {"error": problem.message.removeprefix(f"{problem.field}: "), "field": problem.field}
        except Exception as problem:  # whatever a detector trips over must not end the other streams
            log.exception("message %s of stream %s failed", message.get("op"), message.get("id"))
            self._streams.pop(message.get("id", 0), None)
            return {"error": f"{type(problem).__name__}: {problem}"}

    def _open(self, message: Answer) -> Answer:
        if len(self._streams) >= STREAMS_MAX:
            return {"error": f"{STREAMS_MAX} streams are open"}
        stream = self._streams[message["id"]] = self._formats.open(wanted(message))
        return {"keep_special_tokens": stream.keep_special_tokens}

    def _feed(self, message: Answer) -> Answer:
        return {"deltas": self._streams[message["id"]].feed(message["text"])}

    def _close(self, message: Answer) -> Answer:
        return {"deltas": self._streams.pop(message["id"]).close(complete=message["complete"])}

    def _forget(self, message: Answer) -> Answer:
        self._streams.pop(message["id"], None)
        return {}

    def _grammar(self, message: Answer) -> Answer:
        return {"grammar": self._formats.grammar(wanted(message))}

    def _count(self, message: Answer) -> Answer:
        return {"streams": len(self._streams)}


def wanted(message: Answer) -> Wanted:
    """What a message asks for, checked.

    Raises:
        InvalidRequest: names the tool, or the choice, at fault.
    """
    tools = [_tool(number, tool) for number, tool in enumerate(message["tools"])]
    choice: str | ToolChoice = message["tool_choice"]
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise InvalidRequest("tool_choice", f"names no tool of the request: {name!r}")
        choice = ToolChoice(function={"name": name})
    elif choice not in ("none", "auto", "required"):
        raise InvalidRequest("tool_choice", f"must be none, auto, required or a function, not {choice!r}")
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice", "is required, and there are no tools")
    return Wanted(
        tools=[] if choice == "none" else tools,
        tool_choice=choice,
        prompt=message["prompt"],
        template_kwargs=message["template_kwargs"],
        previous_calls=message["previous_calls"],
        parallel=message["parallel"],
    )


def _tool(number: int, tool: Any) -> Tool:
    try:
        checked = Tool.model_validate(tool)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise InvalidRequest(f"tools[{number}]{where}", first["msg"]) from None
    if not checked.function.name:
        raise InvalidRequest(f"tools[{number}].function.name", "must be given")
    return checked
