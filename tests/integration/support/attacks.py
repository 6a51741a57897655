"""Clients that ask for too much, each in a process of its own: `python -m tests.integration.support.attacks NAME ...`.

Owns what an attacker sends. A process of its own, at the lowest priority, because an attacker is another machine: in
the process of the client beside it, it would take that client's time. It attacks until SIGTERM, and exits with a status
other than 0 where it met an answer that no client should get.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHAT = {"model": "tandem-demo", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
ALLOWED = {"200", "400", "413", "429"}
LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked."""

    url: str
    """Of the edge, without a path."""
    frontend: str
    """host:port of a frontend."""
    key: str
    """The attacker's."""


def post(key: str, body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """A request over HTTP/1.1."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def long_chat(**fields: Any) -> bytes:
    """The body of a chat that streams for long."""
    return json.dumps({**CHAT, "max_tokens": 1_500, "ignore_eos": True, **fields}).encode()


def _address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def keep_sending(url: str, request: bytes, connections: int) -> None:
    """Send a request over each of so many connections, again when it has been answered.

    Reads bytes only: to parse the streams would take the processor time of the others.
    """
    statuses = Counter[str]()

    async def one() -> None:
        while True:
            reader, writer = await asyncio.open_connection(*_address(url))
            try:
                writer.write(request)
                head = await reader.read(65_536)
                statuses[head[9:12].decode()] += 1
                while head and not head.startswith(b"HTTP/1.1 4"):
                    head = await reader.read(65_536)
                    if head.endswith(b"0\r\n\r\n"):
                        break
            finally:
                writer.transport.abort()
            if not head.startswith(b"HTTP/1.1 400"):
                await asyncio.sleep(1)  # as Retry-After says, and after a whole stream

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(one())
    finally:
        assert set(statuses) <= ALLOWED, statuses


async def flood(url: str, once: Callable[[asyncio.StreamWriter], Awaitable[None]], connections: int) -> None:
    """Connect so many times at once, let `once` send until the peer closes, and again."""

    async def one() -> None:
        while True:
            _, writer = await asyncio.open_connection(*_address(url))
            try:
                with contextlib.suppress(OSError):
                    await once(writer)
            finally:
                writer.transport.abort()
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(one())


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    """A header block that never ends."""
    frame = 16_384
    writer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0" + b"\0\0\0\1\0\0\0\0\1")
    continuation = frame.to_bytes(3, "big") + b"\x09\0\0\0\0\1" + b"\x10\x7f\x81\x7f" + b"a" * (frame - 4)
    while True:
        writer.write(continuation)
        await writer.drain()


async def whole_requests_that_are_reset(writer: asyncio.StreamWriter, key: str, open_count: int) -> None:
    """Complete requests, of which the latest `open_count` are open and the others are cancelled."""
    encoder, body = hpack.Encoder(), long_chat()
    headers = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": "/v1/chat/completions"}
    headers |= {"authorization": f"Bearer {key}", "content-type": "application/json"}
    writer.write(PREFACE + b"\0\0\0\4\0\0\0\0\0")
    for stream in range(1, 2**31, 2):
        block, name = encoder.encode(list(headers.items())), stream.to_bytes(4)
        writer.write(len(block).to_bytes(3) + b"\1\4" + name + block)
        writer.write(len(body).to_bytes(3) + b"\0\1" + name + body)
        if stream > 2 * open_count:
            writer.write(b"\0\0\4\3\0" + (stream - 2 * open_count).to_bytes(4) + b"\0\0\0\x08")
        await writer.drain()
        # With none open as fast as possible, otherwise each stays open for 20 ms.
        await asyncio.sleep(0.02 / open_count if open_count else 0)


async def unread_streams(url: str, key: str, count: int) -> None:
    """Hold so many streams and read none of them."""
    request = post(key, long_chat(logprobs=True, top_logprobs=20))
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            held.setblocking(False)
            await loop.sock_connect(held, _address(url))
            await loop.sock_sendall(held, request)
        await asyncio.Event().wait()


async def idle_connections(url: str, count: int) -> None:
    """Hold so many connections that send nothing; one that is closed is opened again."""
    host, port = _address(url)

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    await reader.read()
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one())
            if number % 100 == 0:
                await asyncio.sleep(0.01)


def _resets(target: Target, connections: int, open_count: int) -> Awaitable[None]:
    once = partial(whole_requests_that_are_reset, key=target.key, open_count=open_count)
    return flood(target.url, once, connections)


def _bodies(messages: bytes) -> Callable[[Target], Awaitable[None]]:
    body = b'{"model":"tandem-demo","messages":[' + messages + b"]}"
    return lambda target: keep_sending(target.url, post(target.key, body), 8)


ATTACKS: dict[str, Callable[[Target], Awaitable[None]]] = {
    "choices": lambda at: keep_sending(at.url, post(at.key, long_chat(n=128)), 2),
    "requests": lambda at: keep_sending(at.url, post(at.key, long_chat()), 300),
    "bodies-of-objects": _bodies(b'{"role":"user","content":"a"},' * 34_000 + b'{"role":"user","content":"a"}'),
    "bodies-of-numbers": _bodies(b"0," * 500_000 + b"0"),
    "bodies-of-text": _bodies(b'{"role":"user","content":"' + b"a, " * 300_000 + b'"}'),
    "endless-headers": lambda at: flood(at.frontend, endless_headers, 4),
    "resets": lambda at: _resets(at, 1, 0),
    "resets-on-4-connections": lambda at: _resets(at, 4, 0),
    "resets-of-50-open": lambda at: _resets(at, 1, 50),
    "unread-streams": lambda at: unread_streams(at.url, at.key, 100),
    "idle-connections": lambda at: idle_connections(at.url, 10_000),
}
"""By name; each attacks until it is cancelled."""


@asynccontextmanager
async def attacking(name: str, target: Target) -> AsyncIterator[asyncio.subprocess.Process]:
    """The attack from a process of its own while the block runs.

    Raises:
        AssertionError: it ended by itself, or met an answer that no client should get.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, name, target.url, target.frontend, target.key,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"attacking\n", "the attacker did not start"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def _attack(name: str, target: Target) -> None:
    attack = asyncio.ensure_future(ATTACKS[name](target))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, attack.cancel)
    print("attacking", flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await attack
    await asyncio.sleep(0.1)  # the aborted transports close in the next turn of the loop


def main() -> None:
    """Attack until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ATTACKS)
    for field in ("url", "frontend", "key"):
        parser.add_argument(field)
    given = parser.parse_args()
    os.nice(LOWEST_PRIORITY)
    asyncio.run(_attack(given.name, Target(given.url, given.frontend, given.key)))


if __name__ == "__main__":
    main()
