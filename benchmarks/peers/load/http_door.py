"""OpenAI's chat completions over HTTP/1.1, streamed: a connection for each stream, as clients have.

Owns just enough HTTP and server-sent events for answers of the systems measured; tokens are counted by the words in the
texts and compared with the usage that the answer ends with.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from typing import cast

from benchmarks.peers.load.streams import Load, Stream

PATH = "/v1/chat/completions"
CONTENT = re.compile(rb'"content":\s?"([^"]+)"')
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s?(\d+)')
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
DONE, ERROR = b"data: [DONE]", b'data: {"error"'


class Body:
    """A body in chunks, taken apart as it comes."""

    def __init__(self) -> None:
        self._buffer = b""
        self.is_whole = False

    def feed(self, data: bytes) -> bytes:
        """The bytes of the body in it; a chunk that is not whole waits."""
        if self._buffer:
            data = self._buffer + data
        at, found = 0, []
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line].partition(b";")[0], 16)
            end = line + 2 + size
            if len(data) < end + 2:
                break
            found.append(data[line + 2 : end])
            at = end + 2
            if size == 0:
                self.is_whole = True
                break
        self._buffer = data[at:]
        return b"".join(found)


class ChatStream(Stream, asyncio.Protocol):
    """A client of chat completions."""

    def __init__(self, load: Load, address: str) -> None:
        super().__init__(load)
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._head: bytes | None = b""
        """Of the response, as far as it has come; None: it is read."""
        self._body = Body()
        self._events = b""
        self._problem = ""
        self._usage: int | None = None
        self._is_done = False

    def send(self, prompt: str) -> None:
        """One request, over the connection of the last one if it is still there."""
        plan = self.load.plan
        body = json.dumps(
            {
                "model": plan.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": plan.max_tokens,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = f"POST {PATH} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\ncontent-type: application/json\r\n"
        request = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
        self._reset()
        if self._transport is not None:
            self._write(request)
        else:
            self._connecting = self.load.loop.create_task(self._connect(request))

    async def _connect(self, request: bytes) -> None:
        try:
            await self.load.loop.create_connection(lambda: self, self._host, self._port)
        except OSError as problem:
            self.ended(f"no connection: {problem.strerror}")
        else:
            self._write(request)

    def _write(self, request: bytes) -> None:
        if self._transport is None:
            self.ended("the connection was lost")
            return
        self._acknowledge_at_once()
        self._transport.write(request)

    def _acknowledge_at_once(self) -> None:
        """Or a server without TCP_NODELAY waits for it up to 40 ms; the kernel forgets the wish by itself."""
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        # uvloop has transports of its own classes.
        self._transport = cast("asyncio.Transport", transport)
        self._socket = transport.get_extra_info("socket")

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has gone."""
        self._transport = self._socket = None
        self.ended("the connection was lost")

    def data_received(self, data: bytes) -> None:
        """A piece of the response."""
        at_s = time.monotonic()
        self._acknowledge_at_once()
        if self._head is not None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[: end + 2], self._head[end + 4 :]
            self._head = None
            if not self._accepts(head, data):
                return
        self._read(self._body.feed(data), at_s)
        if self._body.is_whole:
            self._finish()

    def _accepts(self, head: bytes, data: bytes) -> bool:
        """Whether a streamed answer follows; else the request has failed."""
        status = STATUS.match(head)
        if status is not None and status[1] == b"200" and LENGTH.search(head) is None:
            return True
        self._drop()
        self.ended(f"HTTP {status[1].decode() if status else '?'}: {data[:80].decode(errors='replace')}")
        return False

    def _read(self, data: bytes, at_s: float) -> None:
        """Whole events; what has only begun waits."""
        events = self._events + data if self._events else data
        end = events.rfind(b"\n\n")
        if end < 0:
            self._events = events
            return
        events, self._events = events[:end], events[end + 2 :]
        texts = CONTENT.findall(events)
        if texts:
            by_words = sum(text.count(b" ") for text in texts)
            self.got(len(texts) if self.load.plan.counts_events else by_words, at_s)
        if ERROR in events:
            self._problem = events[events.find(ERROR) :][:120].decode(errors="replace")
        if b'"usage"' in events and (usage := COMPLETION_TOKENS.search(events)) is not None:
            self._usage = int(usage[1])
        self._is_done |= DONE in events

    def _finish(self) -> None:
        if self.load.plan.counts_events:
            self.load.recorder.usage(self.received, self._usage or 0)
            self.received = self._usage or 0
        elif self._usage is not None and self._usage != self.received and not self._problem:
            self._problem = f"{self.received} tokens came, the usage is {self._usage}"
        if not self._is_done and not self._problem:
            self._problem = "no [DONE]"
        self.ended(self._problem)

    def _drop(self) -> None:
        """A connection whose answer was not read to its end is of no further use."""
        if self._transport is not None:
            transport, self._transport, self._socket = self._transport, None, None
            transport.abort()
