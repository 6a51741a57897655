"""An upload: a multipart form that arrives in pieces, of which the file goes to disk and never as a whole to memory.

Owns the form's fields and bounds. python-multipart reads the form.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from google.api.httpbody_pb2 import HttpBody
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from tandem.errors import InvalidRequest, RequestTooLarge
from tandem_frontend.batches.directory import new_id
from tandem_frontend.batches.schemas import EXPIRES_MAX_S, EXPIRES_MIN_S

FIELD_BYTES_MAX = 1024
PARTS_MAX = 16
FORM_BYTES_MAX = 64 * 2**10
"""Of all that is not the file."""
WRITE_BYTES = 256 * 2**10
FILENAME_CHARS_MAX = 255
FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
CONTROL = re.compile(r"[\x00-\x1f\x7f/\\]")


class Upload:
    """One upload. Its file is at `path` when `receive` has returned; the caller moves or deletes it."""

    def __init__(self, folder: Path, file_bytes_max: int) -> None:
        self.path = folder / new_id("upload-")
        self.filename = ""
        self._file_bytes_max = file_bytes_max
        self._fields: dict[str, bytes] = {}
        self._name = ""
        """Of the part that arrives."""
        self._header = b""
        self._headers: dict[bytes, bytes] = {}
        self._value = b""
        self._part_count = 0
        self._has_file = False
        self._is_whole = False
        self._pending = bytearray()
        """Of the file, not written yet."""
        self._size = 0
        self._form_bytes = 0

    @property
    def purpose(self) -> str:
        """The field `purpose`; empty: there is none."""
        return self._text("purpose")

    @property
    def expires_s(self) -> float | None:
        """Seconds after which the file is deleted, as the form says; None: it says nothing.

        Raises:
            InvalidRequest: the fields are malformed.
        """
        anchor, seconds = self._text("expires_after[anchor]"), self._text("expires_after[seconds]")
        if not anchor and not seconds:
            return None
        if anchor != "created_at":
            raise InvalidRequest("expires_after.anchor", "must be created_at")
        if not re.fullmatch("[0-9]{1,10}", seconds) or not EXPIRES_MIN_S <= int(seconds) <= EXPIRES_MAX_S:
            raise InvalidRequest("expires_after.seconds", f"must be {EXPIRES_MIN_S} to {EXPIRES_MAX_S}")
        return float(seconds)

    async def receive(self, pieces: AsyncIterator[HttpBody]) -> None:
        """Read the form and write its file, flushed to disk.

        Raises:
            InvalidRequest: it is no form, a field is wrong, or the file is missing or too large.
        """
        parser: MultipartParser | None = None
        with await asyncio.to_thread(self.path.open, "wb") as file:
            async for piece in pieces:
                if parser is None:
                    parser = self._parser(piece.content_type)
                await self._feed(parser, piece.data, file)
            if not self._is_whole:
                raise InvalidRequest("body", "is not a whole multipart form")
            await self._write(file)
            await asyncio.to_thread(os.fsync, file.fileno())
        if not self._has_file:
            raise InvalidRequest("file", "must be given")

    def _parser(self, content_type: str) -> MultipartParser:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
            raise InvalidRequest("body", "must be a multipart form, whose content type names its boundary")
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._take_data,
                "on_part_end": self._end_part,
                "on_header_field": self._take_header_name,
                "on_header_value": self._take_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._end,
            },
        )

    async def _feed(self, parser: MultipartParser, data: bytes, file: BinaryIO) -> None:
        before = self._size
        try:
            parser.write(data)
        except MultipartParseError:
            raise InvalidRequest("body", "is not a multipart form") from None
        self._form_bytes += len(data) - (self._size - before)
        if self._form_bytes > FORM_BYTES_MAX:
            raise InvalidRequest("body", f"beside the file must be at most {FORM_BYTES_MAX} bytes long")
        if len(self._pending) >= WRITE_BYTES:
            await self._write(file)

    async def _write(self, file: BinaryIO) -> None:
        pending, self._pending = self._pending, bytearray()
        await asyncio.to_thread(file.write, pending)

    def _begin_part(self) -> None:
        self._part_count += 1
        if self._part_count > PARTS_MAX:
            raise InvalidRequest("body", f"must be at most {PARTS_MAX} fields")
        self._headers, self._header, self._value, self._name = {}, b"", b"", ""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self._has_file:
                raise InvalidRequest("file", "must be given once")
            self._has_file = True
            filename = options.get(b"filename", b"").decode(errors="replace")
            self.filename = CONTROL.sub("_", filename)[:FILENAME_CHARS_MAX] or "upload"
        elif self._name not in FIELDS:
            raise InvalidRequest(self._name[:64] or "body", "is not a field of an upload")
        else:
            self._fields[self._name] = b""

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            value = self._fields[self._name] = self._fields[self._name] + data[start:end]
            if len(value) > FIELD_BYTES_MAX:
                raise InvalidRequest(self._name, f"must be at most {FIELD_BYTES_MAX} bytes long")
            return
        self._size += end - start
        if self._size > self._file_bytes_max:
            raise RequestTooLarge("file", f"must be at most {self._file_bytes_max} bytes", limit=self._file_bytes_max)
        self._pending += data[start:end]

    def _end_part(self) -> None:
        self._name = ""

    def _end(self) -> None:
        self._is_whole = True

    def _text(self, name: str) -> str:
        return self._fields.get(name, b"").decode(errors="replace")
