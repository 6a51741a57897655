"""Headers of HTTP/2 as gRPC means them: what a request's say, and how a response's and a status are spelt.

Owns names, encodings and what is refused of them. Frames are `framing`'s.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote

from tandem.errors import InvalidRequest, RequestTooLarge
from tandem.rpc.http2.framing import header_block
from tandem.rpc.service_host import HEADERS_BYTES_MAX

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Fields: TypeAlias = Sequence[tuple[bytes, bytes]]

CONTENT_TYPE = b"application/grpc"
CONTENT_TYPES = re.compile(rb"application/grpc([+;].*)?", re.IGNORECASE)
"""Neither grpc-web nor anything else that only begins alike."""
IDENTITY = b"identity"
ENCODINGS = (IDENTITY, b"gzip")
OWN_FIELDS = frozenset(
    (b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding")
)
"""Between the two ends of gRPC; handlers do not see them."""
PSEUDO_FIELDS = frozenset((b":method", b":scheme", b":path", b":authority"))
NAME = re.compile(rb"[0-9a-z_.!#$%&'*+^`|~-]+")
VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
SENT_NAME = re.compile(rb"[0-9a-z_.-]+")
SENT_VALUE = re.compile(rb"([\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?)?")
TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
DETAILS_NAME = b"grpc-status-details-bin"
"""The one field of gRPC's own that a handler may send."""
UNITS_S = {b"H": 3_600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
FIELD_OVERHEAD_BYTES = 32
"""What a field counts beside its bytes, as HTTP/2 says."""
UNQUOTED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

RESPONSE_BLOCK = header_block(200, [(b"content-type", CONTENT_TYPE)])
OK_BLOCK = header_block(None, [(b"grpc-status", b"0")])


class Malformed(Exception):
    """Headers that no HTTP/2 client may send. Ends the stream, as a reset."""


class HttpRefusal(Exception):
    """It is HTTP, but no call of gRPC."""

    def __init__(self, status: int, *fields: tuple[bytes, bytes]) -> None:
        super().__init__(status)
        self.block = header_block(status, fields)


@dataclass(slots=True)
class Request:
    """What the headers of a call say."""

    path: str
    timeout_s: float | None
    encoding: bytes
    fields: Fields
    """All of them, as they came."""

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """As handlers see them.

        Raises:
            InvalidRequest: a binary one is not base64.
        """
        return tuple(
            (name.decode("ascii"), value)
            for name, raw in self.fields
            if not name.startswith(b":") and name not in OWN_FIELDS
            for value in _values(name, raw)
        )


def read_request(fields: Fields) -> Request:
    """Check the headers of a call.

    Raises:
        Malformed: this is not HTTP/2.
        HttpRefusal: this is not gRPC.
        InvalidRequest: it is a call that cannot be served.
    """
    found: dict[bytes, bytes] = {}
    size, seen_regular = 0, False
    for name, value in fields:
        size += len(name) + len(value) + FIELD_OVERHEAD_BYTES
        if name.startswith(b":"):
            if seen_regular or name in found or name not in PSEUDO_FIELDS:
                raise Malformed(name)
        else:
            seen_regular = True
            if not NAME.fullmatch(name) or not VALUE.fullmatch(value):
                raise Malformed(name)
        found[name] = value
    try:
        method, path = found[b":method"], found[b":path"]
    except KeyError as missing:
        raise Malformed(missing.args[0]) from None
    if method != b"POST":
        raise HttpRefusal(405, (b"allow", b"POST"))
    if not CONTENT_TYPES.fullmatch(found.get(b"content-type", b"")):
        raise HttpRefusal(415)
    if size > HEADERS_BYTES_MAX:
        raise RequestTooLarge("metadata", f"{size} bytes are more than {HEADERS_BYTES_MAX}", limit=HEADERS_BYTES_MAX)
    timeout = found.get(b"grpc-timeout")
    return Request(
        path=path.decode("latin-1"),
        timeout_s=None if timeout is None else _timeout_s(timeout),
        encoding=found.get(b"grpc-encoding", IDENTITY),
        fields=fields,
    )


def _timeout_s(value: bytes) -> float:
    match = TIMEOUT.fullmatch(value)
    if match is None:
        raise InvalidRequest("grpc-timeout", "must be up to eight digits and a unit")
    return int(match[1]) * UNITS_S[match[2]]


def _values(name: bytes, raw: bytes) -> Iterable[str | bytes]:
    if name.endswith(b"-bin"):
        for part in raw.split(b","):
            yield _binary(name, part.strip())
        return
    try:
        yield raw.decode()
    except UnicodeDecodeError:
        yield raw.decode("latin-1")


def _binary(name: bytes, part: bytes) -> bytes:
    try:
        return base64.b64decode(part.rstrip(b"=") + b"=" * (-len(part.rstrip(b"=")) % 4), validate=True)
    except binascii.Error:
        raise InvalidRequest(name.decode("ascii"), "is not base64") from None


def sent_fields(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Metadata of a response as fields.

    Raises:
        ValueError: a name or a value that cannot be sent; names it.
    """
    fields = []
    for key, value in metadata:
        name = key.encode()
        is_own = name.startswith(b"grpc-") and name != DETAILS_NAME
        if is_own or not SENT_NAME.fullmatch(name):
            raise ValueError(f"{key!r} cannot be the name of metadata")
        if name.endswith(b"-bin"):
            raw = base64.b64encode(value.encode() if isinstance(value, str) else value).rstrip(b"=")
        else:
            raw = value.encode() if isinstance(value, str) else value
            if not SENT_VALUE.fullmatch(raw):
                raise ValueError(f"the value of {key!r} is not printable ASCII")
        fields.append((name, raw))
    return fields


def status_block(code: int, message: str, fields: Fields, *, opens: bool) -> bytes:
    """The block that ends a call; with `opens` it is the only one."""
    if code == 0 and not opens and not message and not fields:
        return OK_BLOCK
    own = [(b"grpc-status", b"%d" % code)]
    if opens:
        own.insert(0, (b"content-type", CONTENT_TYPE))
    if message:
        own.append((b"grpc-message", _quoted(message)))
    return header_block(200 if opens else None, [*own, *fields])


def _quoted(message: str) -> bytes:
    """A status's message in printable ASCII. A value may not begin or end with a space."""
    quoted = quote(message, safe=UNQUOTED, errors="replace")
    inner = quoted.strip(" ")
    before = len(quoted) - len(quoted.lstrip(" "))
    after = len(quoted) - before - len(inner)
    return ("%20" * before + inner + "%20" * after).encode("ascii")
