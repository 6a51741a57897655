"""The check of a batch's input: every kind of bad line is named with its number, and good lines become rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.batches import input_rows
from tandem_frontend.batches.input_rows import RowReader, check, custom_ids

URL = "/v1/chat/completions"
LINE_MAX = 4096


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    row = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"model": "m"}, **changes}
    return json.dumps({name: value for name, value in row.items() if value is not ...}).encode()


def checked(path: Path, *lines: bytes) -> tuple[int, list[tuple[str, str | None, int | None]]]:
    path.write_bytes(b"\n".join(lines))
    count, errors = check(path, URL, LINE_MAX)
    return count, [(error.code, error.param, error.line) for error in errors]


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b'{"custom_id": ', "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[" * 2_000, "invalid_json_line", None),
        (line(...), "invalid_custom_id", "custom_id"),
        (line(7), "invalid_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(method=...), "invalid_method", "method"),
        (line(url="/v1/completions"), "invalid_url", "url"),
        (line(url=...), "invalid_url", "url"),
        (line(body="x"), "invalid_body", "body"),
        (line(body=...), "invalid_body", "body"),
        (line(note="x"), "unknown_field", "note"),
        (line(body={"x": "y" * LINE_MAX}), "line_too_long", None),
    ],
)
def test_input_with_a_bad_line_names_it(tmp_path: Path, bad: bytes, code: str, param: str | None) -> None:
    count, errors = checked(tmp_path / "input", line("first"), b"", bad, line("last"))
    assert count == 3
    # The third line of the file, counted with the empty one.
    assert errors == [(code, param, 3)]


def test_input_with_many_bad_lines_names_the_first_ones(tmp_path: Path) -> None:
    _, errors = checked(tmp_path / "input", *[b"x"] * 150)
    assert [number for _, _, number in errors] == list(range(1, 101))


def test_input_without_lines_is_an_error(tmp_path: Path) -> None:
    assert checked(tmp_path / "input", b"", b"  ") == (0, [("empty_file", None, None)])


def test_input_with_too_many_lines_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_rows, "ROWS_MAX", 3)
    count, errors = checked(tmp_path / "input", *[line(str(number)) for number in range(9)])
    assert (count, errors) == (4, [("too_many_rows", None, 4)])


def test_input_of_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"\xef\xbb\xbf" + line("a") + b"\r\n" + line("b") + b"\r\n\r\n")
    assert check(path, URL, LINE_MAX) == (2, ())


def test_rows_are_read_in_order_without_those_that_have_a_result(tmp_path: Path) -> None:
    path = tmp_path / "input"
    bodies: list[dict[str, Any]] = [{"n": 1, "text": "\u2028é\ud800"}, {"stream": True}, {"f": 0.1}, {"big": 2**70}]
    path.write_bytes(b"\n\n".join(line(str(number), body=body) for number, body in enumerate(bodies)))
    reader = RowReader(path, LINE_MAX, bytearray([0, 0, 1, 0]))
    rows = [*reader.next_rows(2), *reader.next_rows(2)]
    assert reader.next_rows(2) == []
    reader.close()
    assert [(row.number, row.custom_id, row.is_streamed) for row in rows] == [
        (0, "0", False),
        (1, "1", True),
        (3, "3", False),
    ]
    assert [json.loads(row.body) for row in rows] == [bodies[0], bodies[1], bodies[3]]
    assert list(custom_ids(path, LINE_MAX, bytearray([1, 0, 0, 1]))) == [(1, "1"), (2, "2")]
