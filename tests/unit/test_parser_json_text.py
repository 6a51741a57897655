"""Arguments of calls as they leave: valid JSON in valid UTF-8, however a model wrote them and however they arrive."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.sglang.parsing.json_text import JsonText, is_valid
from tandem.engine.sglang.parsing.pieces import Pieces
from tandem.engine.sglang.parsing.surrogates import EscapedHalves, without_surrogates

CLOSING = 'x"' + "}" * 90
"""Ends whatever is open."""
HOSTILE = st.text(st.sampled_from('{}[]",:\\ \n\tuabd8cfDE0123.-+NanIty\ud83d\ude00é<'), max_size=80)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def sent(*fragments: str) -> str:
    text = JsonText()
    return "".join(text.push(fragment) for fragment in fragments) + text.finish()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"n": NaN, "m": -Infinity, "k": [inf, 1]}', {"n": None, "m": None, "k": [None, 1]}),
        ('{"day": 2026-01-15, "at": 2026-01-15 10:00}', {"day": "2026-01-15", "at": "2026-01-15 10:00"}),
        ('{"t": "cut \\ud83d"}', {"t": "cut \ufffd"}),
        ('{"t": "\\ude00\\ud83d\\ude00"}', {"t": "\ufffd😀"}),
        ('{"t": "\ud83d\ude00 \ud83d"}', {"t": "😀 \ufffd"}),
        ('{"a": 1}<', {"a": 1}),
        ('{"p": "C:\\dir", "q": "\\u12"}', {"p": "C:\\dir", "q": "\\u12"}),
        ('{"t": "two\nlines\x00"}', {"t": "two\nlines\x00"}),
        ("{a: True, 'b': None,}", {"a": True, "'b'": None}),
        ('{"a": [1, 2}', {"a": [1, 2]}),
        ('{"a": 007, "b": 1_000}', {"a": "007", "b": "1_000"}),
        ('{"a"}', {"a": None}),
        ('{"a": , "b": 1 "c": 2}', {"a": None, "b": '1 "c": 2'}),
        ("NaN", None),
        ("5", 5),
    ],
)
def test_what_is_no_json_has_a_json_value(written: str, expected: Any) -> None:
    assert json.loads(sent(written)) == expected
    assert sent(*written) == sent(written)


def test_what_was_cut_off_stays_open() -> None:
    assert sent('{"command": "rm -rf /tmp') == '{"command": "rm -rf /tmp'
    assert sent('{"a": 12') == '{"a": '


@given(value=VALUES, ascii_only=st.booleans(), size=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_valid_json_is_sent_as_it_is(value: Any, ascii_only: bool, size: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert sent(*(text[at : at + size] for at in range(0, len(text), size))) == text


@given(text=HOSTILE)
@settings(max_examples=1_000, deadline=None)
def test_any_text_gives_valid_json_under_every_cutting(text: str) -> None:
    written = '{"k": ' + text + CLOSING
    whole = sent(written)
    assert is_valid(whole), whole
    assert sent(*written) == whole


@given(st.lists(st.sampled_from(["\\ud83d", "\\ude00", "\\\\", "\\n", "a", '\\"', "\\u0041", " "]), max_size=9))
@settings(max_examples=500, deadline=None)
def test_escaped_halves_are_replaced(parts: list[str]) -> None:
    text = '"' + "".join(parts) + '"'
    halves, pieces = EscapedHalves(), Pieces()
    mended = "".join(halves.push(piece) for piece in pieces.push(text) + pieces.flush()) + halves.flush()
    assert json.loads(mended) == without_surrogates(json.loads(text))
