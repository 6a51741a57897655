"""Fake workers that speak OpenAI's chat completions over HTTP/1.1, as SGLang does behind sglang-router.

Owns just enough HTTP for one well-behaved client on loopback; no server for anybody else.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from functools import partial
from typing import Any, cast

from benchmarks.peers.words import Words
from benchmarks.peers.workers.listening import Listeners
from benchmarks.peers.workers.steps import OpenStream, Pace, Steps

CHAT = b"/v1/chat/completions"
STREAM_HEADERS = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Answer(OpenStream):
    """One streamed answer and its connection."""

    __slots__ = ("connection", "head", "prompt_tokens")

    def __init__(self, connection: HttpConnection, head: bytes, prompt_tokens: int, *rest: Any) -> None:
        super().__init__(*rest)
        self.connection = connection
        self.head = head
        """What each of its events begins with."""
        self.prompt_tokens = prompt_tokens


class HttpWorker:
    """One worker of one role."""

    def __init__(self, role: str, options: dict[str, Any], words: Words, pace: Pace, waits: list[Any]) -> None:
        self._role = role
        self._options = options
        self._words = words
        self._at_once = pace.tokens_at_once
        self._steps = Steps(pace, self._on_step, waits)
        self._numbers = itertools.count(1)

    def answer(self, connection: HttpConnection, method: bytes, path: bytes, body: bytes) -> None:
        """Answer one request."""
        if method == b"POST" and path == CHAT:
            self._chat(connection, json.loads(body))
        else:
            connection.send_json(self._facts(path.partition(b"?")[0]))

    def left(self, answer: Answer) -> None:
        """The client of a stream has gone."""
        self._steps.remove(answer)

    def _facts(self, path: bytes) -> dict[str, Any]:
        """What a router asks of a worker beside work; health is any answer."""
        model = self._options["model_name"]
        if path == b"/v1/models":
            return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "benchmark"}]}
        return {
            "status": "ok",
            "model_path": self._options["model"],
            "tokenizer_path": self._options["model"],
            "served_model_name": model,
            "is_generation": True,
            "disaggregation_mode": self._role,
            "version": "benchmark",
        }

    def _chat(self, connection: HttpConnection, request: dict[str, Any]) -> None:
        prompt = request["messages"][-1]["content"]
        number = next(self._numbers)
        if self._role == "prefill":
            return connection.send_json({"id": f"chatcmpl-{number}", "object": "chat.completion", "choices": []})
        facts = {"id": f"chatcmpl-{number}", "object": "chat.completion.chunk", "created": int(time.time())}
        head = json.dumps(facts)[:-1] + f', "model": {json.dumps(request["model"])}, '
        total = request.get("max_tokens") or request.get("max_completion_tokens") or 1
        serial = self._words.serial_of_text(prompt)
        answer = Answer(connection, f"data: {head}".encode(), len(prompt.split()), serial, total, time.monotonic())
        connection.begin_stream(answer)
        return self._steps.add(answer)

    def _on_step(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        for answer in due:
            assert isinstance(answer, Answer)
            count = answer.take(self._at_once)
            begin, texts = answer.word_at + answer.sent, self._words.texts
            text = "".join(f" {texts[place % len(texts)]}" for place in range(begin, begin + count))
            answer.sent += count
            data = chunk(answer.head + CHOICE % text.encode())
            if answer.sent >= answer.total:
                data += self._end(answer)
            answer.connection.write(data)

    def _end(self, answer: Answer) -> bytes:
        used = (answer.prompt_tokens, answer.sent, answer.prompt_tokens + answer.sent)
        answer.connection.end_stream()
        return chunk(answer.head + FINISH) + chunk(answer.head + USAGE % used) + chunk(DONE) + LAST_CHUNK


CHOICE = b'"choices": [{"index": 0, "delta": {"content": "%b"}, "logprobs": null, "finish_reason": null}]}\n\n'
FINISH = b'"choices": [{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "length"}]}\n\n'
USAGE = b'"choices": [], "usage": {"prompt_tokens": %d, "completion_tokens": %d, "total_tokens": %d}}\n\n'


class HttpConnection(asyncio.Protocol):
    """One connection: a request at a time, bodies with a length."""

    def __init__(self, worker: HttpWorker) -> None:
        self._worker = worker
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        # uvloop has transports of its own classes.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._transport = None
        if self._answer is not None:
            self._worker.left(self._answer)

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            size = 0
            at = head.find(b"\r\ncontent-length:")
            if at >= 0:
                size = int(head[at + 17 :].split(b"\r\n", 1)[0])
            if len(self._buffer) < end + 4 + size:
                return
            method, path, _ = self._buffer[: self._buffer.find(b"\r\n")].split(b" ", 2)
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            self._worker.answer(self, method, path, body)

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def write(self, data: bytes) -> None:
        """Send, if anybody is there."""
        if self._transport is not None:
            self._transport.write(data)

    def send_json(self, answer: dict[str, Any]) -> None:
        """A whole answer."""
        body = json.dumps(answer).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.write(head + body)

    def begin_stream(self, answer: Answer) -> None:
        """The headers of a streamed answer."""
        self._answer = answer
        self.write(STREAM_HEADERS)

    def end_stream(self) -> None:
        """The answer is whole."""
        self._answer = None


class HttpFleet:
    """Fake workers of both roles."""

    def __init__(self, words: Words, pace: Pace) -> None:
        self._words = words
        self._pace = pace
        self.waits: list[tuple[int, float]] = []
        self.starts: dict[str, int] = {}
        self.listeners = Listeners()

    async def open(self, options: dict[str, Any]) -> dict[str, list[int]]:
        """Serve. Returns the ports by role."""
        ports: dict[str, list[int]] = {"prefill": [], "decode": []}
        for role in ports:
            for _ in range(options[role]):
                worker = HttpWorker(role, options, self._words, self._pace, self.waits)
                ports[role].append(await self.listeners.open(partial(HttpConnection, worker)))
        return ports
