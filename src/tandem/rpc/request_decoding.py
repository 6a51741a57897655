"""Decoding of requests: an unreadable one is rejected with the field's name, where gRPC would answer INTERNAL.

Owns the size limit, and the search for the string that is not UTF-8 in bytes that protobuf has rejected. Knows no
service.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import empty_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from tandem.errors import InvalidRequest, RequestTooLarge

LENGTH_DELIMITED = 2
SEARCH_BYTES_MAX = 256 * 2**10
"""Limit of the search, which visits every field: in a larger request it could block the event loop."""


def checked_deserializer(
    message_type: type[Message], request_bytes_max: int
) -> Callable[[bytes], Message | InvalidRequest]:
    """A deserialiser that returns its error: gRPC would replace a raised one by INTERNAL."""

    def deserialize(data: bytes) -> Message | InvalidRequest:
        if len(data) > request_bytes_max:
            return RequestTooLarge(
                "request", f"{len(data)} bytes are more than {request_bytes_max}", limit=request_bytes_max
            )
        try:
            return message_type.FromString(data)
        except DecodeError:
            field = find_invalid_utf8(data, message_type.DESCRIPTOR) if len(data) <= SEARCH_BYTES_MAX else None
            if field is None:
                return InvalidRequest("request", f"is not a protobuf {message_type.DESCRIPTOR.full_name}")
            return InvalidRequest(field, "is not valid UTF-8")

    return deserialize


def find_invalid_utf8(data: bytes, descriptor: Any) -> str | None:
    """Dotted name of the first string field that is not UTF-8; None when there is none, or the data is no message."""
    try:
        # All fields are unknown to an empty message, so that they can be listed. Any: the stubs lack the iterator.
        fields: Any = UnknownFieldSet(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return None
    for unknown in fields:
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or unknown.wire_type != LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(unknown.data):
            return str(field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = find_invalid_utf8(unknown.data, field.message_type)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
