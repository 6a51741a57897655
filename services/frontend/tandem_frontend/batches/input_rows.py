"""The input of a batch: one request a line, checked as a whole before the first one runs.

Owns the form of a line. What is wrong with a request's own body is found when it runs, and concerns that row only.
Functions block, and run in threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tandem_frontend.batches.directory import gently
from tandem_frontend.batches.records import RowError

ROWS_MAX = 50_000
"""As in OpenAI's API."""
ERRORS_MAX = 100
"""Of one input; what follows is not checked."""
CUSTOM_ID_CHARS_MAX = 512
FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a batch."""

    number: int
    """From 0 on, without empty lines."""
    custom_id: str
    body: bytes
    """JSON, as the endpoint takes it."""
    is_streamed: bool
    """Whether it asks for a stream, which no file can hold."""


def check(path: Path, endpoint: str, line_bytes_max: int) -> tuple[int, tuple[RowError, ...]]:
    """Rows in an input, and what is wrong with it: nothing, or its first errors."""
    errors: list[RowError] = []
    seen: set[str] = set()
    count = 0
    with path.open("rb") as file:
        for number, line in gently(_lines(file, line_bytes_max)):
            count += 1
            error = _error_in(line, endpoint, line_bytes_max, seen)
            if error is not None:
                errors.append(RowError(error.code, error.message, error.param, number))
            if count > ROWS_MAX:
                errors.append(RowError("too_many_rows", f"must be at most {ROWS_MAX} lines", None, number))
            if count > ROWS_MAX or len(errors) >= ERRORS_MAX:
                break
    if not count:
        errors.append(RowError("empty_file", "the input file has no line"))
    return count, tuple(errors)


class RowReader:
    """Reads the rows of a checked input in order, without those that have their result."""

    def __init__(self, path: Path, line_bytes_max: int, done: bytearray) -> None:
        """`done` has a 1 for each row that is left out."""
        self._file = path.open("rb")
        self._lines = enumerate(line for _, line in _lines(self._file, line_bytes_max))
        self._done = done

    def next_rows(self, count_max: int) -> list[Row]:
        """Up to so many rows more; none: this was all."""
        rows: list[Row] = []
        for number, line in gently(self._lines):
            if not self._done[number]:
                rows.append(_row(number, line))
                if len(rows) == count_max:
                    break
        return rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _row(number: int, line: bytes) -> Row:
    given = json.loads(line)
    body = given["body"]
    try:
        text = json.dumps(body).encode()
    except RecursionError:
        text = b"null"  # refused by its endpoint, like everything that is nested too deeply
    return Row(number, given["custom_id"], text, bool(body.get("stream")))


def custom_ids(path: Path, line_bytes_max: int, done: bytearray) -> Iterator[tuple[int, str]]:
    """Number and custom id of each row that has no result."""
    with path.open("rb") as file:
        for number, (_, line) in enumerate(gently(_lines(file, line_bytes_max))):
            if not done[number]:
                yield number, json.loads(line)["custom_id"]


def _lines(file: BinaryIO, bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers from 1 on; one that is too long is cut off behind the bound."""
    number = 0
    while line := file.readline(bytes_max + 2):
        number += 1
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(bytes_max)):
            pass
        line = line.strip()
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows writes it
        if line:
            yield number, line


def _error_in(line: bytes, endpoint: str, bytes_max: int, seen: set[str]) -> RowError | None:
    """What is wrong with a line, without its number. `seen`: custom ids of the lines before."""
    if len(line) > bytes_max:
        return RowError("line_too_long", f"must be at most {bytes_max} bytes long")
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return RowError("invalid_json_line", "is not JSON")
    if not isinstance(row, dict):
        return RowError("invalid_json_line", "must be a JSON object")
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_CHARS_MAX:
        return RowError("invalid_custom_id", f"must be a text of 1 to {CUSTOM_ID_CHARS_MAX} characters", "custom_id")
    if custom_id in seen:
        return RowError("duplicate_custom_id", "is that of an earlier line", "custom_id")
    seen.add(custom_id)
    if row.get("method") != "POST":
        return RowError("invalid_method", "must be POST", "method")
    if row.get("url") != endpoint:
        return RowError("invalid_url", f"must be the endpoint of the batch, {endpoint}", "url")
    if not isinstance(row.get("body"), dict):
        return RowError("invalid_body", "must be a JSON object", "body")
    unknown = next((name for name in row if name not in FIELDS), None)
    if unknown is not None:
        return RowError("unknown_field", f"is none of {', '.join(sorted(FIELDS))}", unknown[:64])
    return None
