"""Journals of results: what two processes have written, torn lines included, becomes each row once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tandem_frontend.batches.journal import Entry, Journal, read_entries, write_results


def written(folder: Path, *rows: tuple[int, bytes, bool]) -> Path:
    """A journal of its own; returns its path."""
    before = set(folder.iterdir())
    journal = Journal(folder)
    for number, text, is_error in rows:
        journal.append(number, text, is_error=is_error)
    journal.close()
    (path,) = set(folder.iterdir()) - before
    return path


def results(folder: Path, count: int, entries: list[Entry | None] | None = None) -> tuple[list[bytes], list[bytes]]:
    """Lines of the output file and of the error file."""
    found = read_entries(folder, count) if entries is None else entries
    for errors in (False, True):
        write_results(found, folder.parent / f"{errors}", errors=errors)
    return tuple((folder.parent / f"{errors}").read_bytes().splitlines() for errors in (False, True))  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "batch").mkdir()
    return tmp_path / "batch"


def test_results_are_in_the_order_of_the_rows(folder: Path) -> None:
    written(folder, (2, b'{"c":3}', False), (0, b'{"a":1}', False), (1, b'{"b":2}', True))
    assert results(folder, 3) == ([b'{"a":1}', b'{"c":3}'], [b'{"b":2}'])


def test_a_row_that_two_processes_have_run_is_there_once(folder: Path) -> None:
    paths = [written(folder, (0, b'{"of":1}', False), (1, b'{"x":1}', False)), written(folder, (0, b'{"of":2}', True))]
    output, errors = results(folder, 2)
    assert len(output) + len(errors) == 2
    assert paths[0] != paths[1]


def test_a_row_without_a_result_is_none(folder: Path) -> None:
    written(folder, (1, b"{}", False))
    assert [entry is not None for entry in read_entries(folder, 3)] == [False, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_a_torn_journal_loses_only_the_torn_rows(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    texts = [b'{"n":%d,"text":"%s"}' % (number, b"x" * draw.randrange(200)) for number in range(20)]
    path = written(folder, *((number, text, False) for number, text in enumerate(texts)))
    whole = path.read_bytes()
    cut = draw.randrange(len(whole))
    # What a loss of power leaves: an end that is missing, or blocks of zeros.
    path.write_bytes(whole[:cut] + (b"\0" * (len(whole) - cut) if seed % 2 else b""))
    kept = whole[:cut].count(b"\n")
    entries = read_entries(folder, 20)
    assert [entry is not None for entry in entries] == [number < kept for number in range(20)]
    # The next process runs the others, in a journal of its own.
    written(folder, *((number, texts[number], False) for number in range(kept, 20)))
    assert results(folder, 20) == (texts, [])


def test_a_line_that_was_changed_does_not_count(folder: Path) -> None:
    path = written(folder, (0, b'{"a":1}', False))
    path.write_bytes(path.read_bytes().replace(b'"a":1', b'"a":2'))
    assert read_entries(folder, 1) == [None]


def test_a_row_beyond_the_input_does_not_count(folder: Path) -> None:
    written(folder, (5, b"{}", False))
    assert read_entries(folder, 2) == [None, None]
