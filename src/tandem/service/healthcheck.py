"""`python -m tandem.service.healthcheck registry`: is the service of that name healthy? For the checks of containers.

A container is asked every few seconds for as long as it lives, so this imports the standard library only and takes a
tenth of the time of `tandem health`: it writes the one gRPC call itself. It finds address and certificates where
the service does, in the variables TANDEM_<SERVICE>_*. For people there is `tandem health`.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import sys
from collections.abc import Iterator, Mapping

TIMEOUT_S = 8.0
LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = ("", "0.0.0.0", "::", "[::]")
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
STREAM = 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVING = b"\x00\x00\x00\x00\x02\x08\x01"
"""The answer: not compressed, two bytes, field 1 of HealthCheckResponse is SERVING."""


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Print what the service says. Returns the exit status: 0 when it serves, 1 when not, 2 when asked wrongly."""
    if len(arguments) != 1:
        print("usage: python -m tandem.service.healthcheck registry|frontend|prefill|decode|edge", file=sys.stderr)
        return 2
    prefix = f"TANDEM_{arguments[0].upper()}_"
    try:
        port = int(environ[f"{prefix}PORT"])
    except (KeyError, ValueError):
        print(f"{prefix}PORT is not the number of a port", file=sys.stderr)
        return 2
    host = environ.get(f"{prefix}HOST", LOOPBACK)
    place = (LOOPBACK if host in EVERY_ADDRESS else host, port)
    try:
        with _connect(place, environ, prefix) as connection:
            serves = _is_ready(connection) if arguments[0] == "edge" else _is_serving(connection)
    except OSError as problem:
        print(f"{place[0]}:{port} does not answer: {problem}")
        return 1
    print("serving" if serves else "not serving")
    return 0 if serves else 1


def _connect(place: tuple[str, int], environ: Mapping[str, str], prefix: str) -> socket.socket:
    """A connection, with TLS where the service has a certificate, which is shown as the caller's too."""
    plain = socket.create_connection(place, TIMEOUT_S)
    cert, key = environ.get(f"{prefix}TLS_CERT"), environ.get(f"{prefix}TLS_KEY")
    if cert is None or key is None:
        return plain
    # Whoever is there is asked whether it is well, and told nothing: its certificate need not be looked at.
    context = ssl._create_unverified_context()  # noqa: S323
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"] if prefix != "TANDEM_EDGE_" else ["http/1.1"])
    return context.wrap_socket(plain)


def _is_ready(connection: socket.socket) -> bool:
    """The edge speaks HTTP."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    return connection.recv(64).split(b" ")[1:2] == [b"200"]


def _is_serving(connection: socket.socket) -> bool:
    """`grpc.health.v1.Health/Check` of the process as a whole."""
    call = _frame(HEADERS, END_HEADERS, STREAM, _headers()) + _frame(DATA, END_STREAM, STREAM, b"\x00" * 5)
    connection.sendall(PREFACE + _frame(SETTINGS, 0, 0, b"") + call)
    answer = b""
    for kind, flags, stream, payload in _frames(connection):
        if kind in (SETTINGS, PING) and not flags & ACK:
            connection.sendall(_frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == DATA and stream == STREAM:
            answer += payload
        elif kind in (RST_STREAM, GOAWAY):
            return False
        if stream == STREAM and flags & END_STREAM:
            return answer == SERVING
    return False


def _headers() -> bytes:
    """POST, http, and the rest, as HPACK writes what it does not remember: by number, or plain."""
    plain = ((4, b"/grpc.health.v1.Health/Check"), (1, b"localhost"))
    block = b"\x83\x86" + b"".join(bytes((name, len(value))) + value for name, value in plain)
    # content-type is 31 of the static table, 15 of which fit into the first byte.
    return block + b"\x0f\x10\x10application/grpc" + b"\x00\x02te\x08trailers"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each frame that comes; ends with the connection."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            length = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number & 0x7FFFFFFF, stream.read(length)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
