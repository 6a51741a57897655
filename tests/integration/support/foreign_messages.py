"""What reaches an engine's ports although no engine sent it: payloads over plain TCP, and messages over ZMQ.

`sockets` finds the ports. Payloads are the same in each run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import zmq

from tandem.engine.sglang.hooks.handover_messages import GUARD

GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL".ljust(64, b"\x00")
"""Of ZMTP 3.0, without security."""
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH\x08Identity\x00\x00\x00\x00"
SCRAPE = (
    b"GET /metrics HTTP/1.1\r\nHost: %s\r\nUser-Agent: Prometheus/3.1.0\r\nAccept: application/openmetrics-text;"
    b"version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.1\r\nAccept-Encoding: gzip\r\n"
    b"X-Prometheus-Scrape-Timeout-Seconds: 10\r\n\r\n"
)
ROOM = str(2**61 + 5).encode()
PEER = [b"127.0.0.1", b"40001", b"agent"]
SENT_WITHIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket."""

    pid: int
    host: str
    port: int


def sockets(pid: int) -> list[Listener]:
    """All that listen in a process and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return [
        Listener(process.pid, connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="example.org")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def _zmtp_frame(body: bytes, *, more: bool) -> bytes:
    return struct.pack(">BQ", 2 | more, len(body)) + body


def payloads() -> dict[str, bytes]:
    """Over plain TCP."""
    draw = random.Random(17)
    zmtp = GREETING + READY
    return {
        "nothing": b"",
        "a word": b"hello",
        "a line": b"hello\r\n",
        "zeros": bytes(4_096),
        "a scrape": SCRAPE,
        "a request of HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
        "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "a TLS hello": _client_hello(),
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
        "a query of Redis": b"*1\r\n$4\r\nPING\r\n",
        "64 KiB of noise": draw.randbytes(65_536),
        "more noise": draw.randbytes(65_536),
        "ZMTP 1.0": b"\x01\x00" + b"\x06\x00hello" * 3,
        "half a greeting": GREETING[:20],
        "a greeting, then noise": GREETING + draw.randbytes(4_096),
        "a greeting, then one frame": zmtp + _zmtp_frame(b"hello", more=False),
        "a frame that is announced as 2 GiB": zmtp + struct.pack(">BQ", 2, 2**31) + bytes(1_024),
        "a message that does not end": zmtp + _zmtp_frame(b"junk", more=True) * 64,
    }


def messages() -> Iterator[list[bytes]]:
    """Over ZMQ: junk of 1 to 20 frames, and what begins as the engine's own messages do."""
    draw = random.Random(18)
    for count in range(1, 21):
        yield [draw.randbytes(draw.choice((0, 1, 8, 64, 4_096))) for _ in range(count)]
    request = [GUARD, ROOM, *PEER, struct.pack("2i", 1, 2), b"0", b"1", b"", b"0", b"0"]
    registration = [GUARD, b"None", *PEER, b"metadata", *[struct.pack("1Q", 1)] * 2, b"", b"0", b"1", b"0", b"1024"]
    registration += [b"", b"", b"", b"", b"16", b"DRAM", struct.pack("1Q", 1024), b"", b"", b"1", b"0", b""]
    for whole in (request, registration):
        for count in range(1, len(whole) + 1):
            yield whole[:count]
        for at in range(1, len(whole)):
            yield [*whole[:at], b"\xff\xfe\xfd", *whole[at + 1 :]]
    # Metadata as NIXL writes it, but damaged, and more of it than any engine has.
    for metadata in (b"nixlSerDes|" + draw.randbytes(200), bytes(2 * 2**20), b"nixlSerDes|" + bytes(100)):
        yield [*registration[:5], metadata, *registration[6:]]
    for tag in (b"ABORT", b"WATERMARK", b"STAGING_RSP", b"KV_STATUS", b"ABORT_ACK", b"CHUNK_READY", b"STAGING_REQ"):
        for count in range(8):
            yield [tag, *[b"x"] * count]
            yield [tag, *[b"9" * 40] * count]
            yield [tag, *[b"1"] * count]


async def send_raw(listener: Listener, payload: bytes) -> None:
    """Connect, send, wait briefly for an answer, close. Whatever the other side does to the connection is right."""
    try:
        async with asyncio.timeout(SENT_WITHIN_S):
            reader, writer = await asyncio.open_connection(_reachable(listener.host), listener.port)
            writer.write(payload)
            await writer.drain()
            try:
                async with asyncio.timeout(0.05):
                    await reader.read(1_024)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        pass


def send_messages(listener: Listener) -> None:
    """Send each of `messages`, as a PUSH socket does; to a port that does not speak ZMQ they do not arrive."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 1_000)
        push.setsockopt(zmq.SNDTIMEO, 1_000)
        push.connect(f"tcp://{_reachable(listener.host)}:{listener.port}")
        for frames in messages():
            push.send_multipart(frames)


def speaks_zmq(listener: Listener) -> bool:
    """Whether the port greets as ZMQ does."""
    with socket.create_connection((_reachable(listener.host), listener.port), timeout=1) as connection:
        try:
            connection.sendall(GREETING)
            return connection.recv(10)[:1] == b"\xff"
        except OSError:
            return False


def _reachable(host: str) -> str:
    return {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(host, host.removeprefix("::ffff:"))
