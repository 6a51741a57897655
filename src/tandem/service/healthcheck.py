"""`python -m tandem.service.healthcheck registry`: checks the health of that service, for container health checks.

It runs every few seconds in each container, so it imports the standard library only and implements the one gRPC call
itself: that takes a tenth of the time of `tandem health`. Address and certificates come from the service's own
variables TANDEM_<SERVICE>_*. People use `tandem health`.
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
REACHED_AT = {"": LOOPBACK, "0.0.0.0": LOOPBACK, "::": "::1"}
"""Where a service answers that listens on every address of a machine."""
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
STREAM = 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVING = b"\x00\x00\x00\x00\x02\x08\x01"
"""The response message: uncompressed, two bytes, field 1 of HealthCheckResponse is SERVING."""


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Print the health of the service. Returns the exit status: 0 serving, 1 not serving, 2 wrong usage."""
    if len(arguments) != 1:
        print("usage: python -m tandem.service.healthcheck registry|frontend|prefill|decode|edge", file=sys.stderr)
        return 2
    prefix = f"TANDEM_{arguments[0].upper()}_"
    try:
        port = int(environ[f"{prefix}PORT"])
    except (KeyError, ValueError):
        print(f"{prefix}PORT must be a port number", file=sys.stderr)
        return 2
    host = environ.get(f"{prefix}HOST", LOOPBACK).strip("[]")
    address = (REACHED_AT.get(host, host), port)
    try:
        with _connect(address, environ, prefix) as connection:
            serves = _is_ready(connection) if arguments[0] == "edge" else _is_serving(connection)
    except OSError as problem:
        print(f"{address[0]}:{port} is unreachable: {problem}")
        return 1
    print("serving" if serves else "not serving")
    return 0 if serves else 1


def _connect(address: tuple[str, int], environ: Mapping[str, str], prefix: str) -> socket.socket:
    """A connection, with TLS if the service has a certificate, which is also presented as the client certificate."""
    plain = socket.create_connection(address, TIMEOUT_S)
    cert, key = environ.get(f"{prefix}TLS_CERT"), environ.get(f"{prefix}TLS_KEY")
    if cert is None or key is None:
        return plain
    # Unverified: the check runs inside the service's own container and sends no secret.
    context = ssl._create_unverified_context()  # noqa: S323
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"] if prefix != "TANDEM_EDGE_" else ["http/1.1"])
    return context.wrap_socket(plain)


def _is_ready(connection: socket.socket) -> bool:
    """Health of the edge: GET /healthz."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    return connection.recv(64).split(b" ")[1:2] == [b"200"]


def _is_serving(connection: socket.socket) -> bool:
    """`grpc.health.v1.Health/Check` of the whole process."""
    call = _frame(HEADERS, END_HEADERS, STREAM, _headers()) + _frame(DATA, END_STREAM, STREAM, b"\x00" * 5)
    connection.sendall(PREFACE + _frame(SETTINGS, 0, 0, b"") + call)
    response = b""
    for kind, flags, stream, payload in _frames(connection):
        if kind in (SETTINGS, PING) and not flags & ACK:
            connection.sendall(_frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == DATA and stream == STREAM:
            response += payload
        elif kind in (RST_STREAM, GOAWAY):
            return False
        if stream == STREAM and flags & END_STREAM:
            return response == SERVING
    return False


def _headers() -> bytes:
    """The request headers in HPACK, without the dynamic table: indexed names, or literals."""
    plain = ((4, b"/grpc.health.v1.Health/Check"), (1, b"localhost"))
    block = b"\x83\x86" + b"".join(bytes((name, len(value))) + value for name, value in plain)
    # content-type has index 31 in the static table; the 4-bit prefix of the first byte encodes 15 of it.
    return block + b"\x0f\x10\x10application/grpc" + b"\x00\x02te\x08trailers"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, stream id and payload of each received frame, until the connection is closed."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            length = int.from_bytes(head[:3], "big")
            kind, flags, number = struct.unpack(">BBI", head[3:])
            yield kind, flags, number & 0x7FFFFFFF, stream.read(length)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
