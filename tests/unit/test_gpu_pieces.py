"""Packing for a GPU machine: nothing is lost, no piece is too large, and only other GPUs' code is removed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.gpu import pieces, thin


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=6), st.integers(0, 300), max_size=20))
def test_every_byte_of_every_file_is_in_exactly_one_unit(files: dict[str, int]) -> None:
    held = dict.fromkeys(files, 0)
    whole = set[str]()
    for unit in pieces.plan(files.items(), chunk_bytes=100):
        if unit.offset is None:
            assert whole.isdisjoint(unit.files)
            whole |= set(unit.files)
            for name in unit.files:
                held[name] += files[name]
        else:
            assert unit.offset == held[unit.files[0]]
            assert 0 < unit.size_bytes <= 100
            held[unit.files[0]] += unit.size_bytes
    assert held == files
    assert whole == {name for name, size in files.items() if size <= 50}


@given(st.lists(st.integers(1, 100), max_size=40))
def test_no_piece_is_larger_than_its_limit(sizes: list[int]) -> None:
    named = [(f"unit-{number}", size) for number, size in enumerate(sizes)]
    gathered = pieces.gather(named, 100)
    assert sorted(name for names in gathered for name in names) == sorted(name for name, _ in named)
    assert all(sum(dict(named)[name] for name in names) <= 100 for names in gathered)


def test_a_unit_that_fits_no_piece_is_named() -> None:
    with pytest.raises(ValueError, match=r"000\.part has 11 bytes"):
        pieces.gather([("000.part", 11)], 10)


def test_a_folder_comes_out_of_its_pieces_as_it_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    (folder / "package").mkdir(parents=True)
    large = bytes(range(256)) * 40
    (folder / "large.so").write_bytes(large)
    (folder / "package" / "__init__.py").write_text("value = 1\n")
    (folder / "package" / "empty").write_bytes(b"")
    monkeypatch.setattr(pieces.plan, "__defaults__", (4096,))
    written = pieces.pack(folder, tmp_path / "out", limit_bytes=4096, workers=1)
    for piece in reversed(written):
        assert sum(file.stat().st_size for file in piece.glob("*.zst")) <= 4096
        pieces.unpack(piece, tmp_path / "there", workers=1)
    there = {path.relative_to(tmp_path / "there"): path for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert {str(name) for name in there} == {"large.so", "package/__init__.py", "package/empty"}
    assert there[Path("large.so")].read_bytes() == large
    assert there[Path("package/__init__.py")].read_text() == "value = 1\n"


def container(*entries: tuple[int, bytes]) -> bytes:
    body = b""
    for architecture, payload in entries:
        header = bytearray(thin.ENTRY_HEADER_MIN_BYTES)
        thin.ENTRY.pack_into(header, 0, 2, 1, len(header), len(payload))
        struct.pack_into("<I", header, thin.ARCHITECTURE_AT, architecture)
        body += bytes(header) + payload
    return thin.CONTAINER.pack(thin.MAGIC, 1, thin.CONTAINER.size, len(body)) + body


def test_only_the_code_of_other_gpus_is_zeroed() -> None:
    first = container((80, b"o" * 24), (90, b"k" * 32))
    section = bytearray(first + bytes(8) + container((90, b"K" * 8), (120, b"O" * 16)))
    length = len(section)
    assert thin.thin(section, 90) == 24 + 16
    assert len(section) == length
    assert section.count(b"k" * 32) == 1
    assert section.count(b"K" * 8) == 1
    assert b"o" not in section
    assert b"O" not in section
    assert [entry.architecture for entry in thin.entries(section)] == [80, 90, 90, 120]


def test_unwanted_kernels_go_too() -> None:
    kept = b"_ZN25CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJEEELi128ENS_10bfloat16_tEf"
    other_type = kept.replace(b"10bfloat16_t", b"6half_t")
    other_size = kept.replace(b"Li128E", b"Li256E")
    section = bytearray(container(*((90, code) for code in (kept, other_type, other_size, b"a helper without a name"))))
    thin.thin(section, 90, thin.attention_wanted)
    assert kept in section
    assert other_type not in section
    assert other_size not in section
    assert b"a helper" in section
