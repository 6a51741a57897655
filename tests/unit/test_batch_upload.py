"""An upload: a multipart form in any pieces goes to disk, and what is wrong with it is named."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.api.httpbody_pb2 import HttpBody
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.batches.upload import FIELD_BYTES_MAX, PARTS_MAX, Upload

from tandem.errors import InvalidRequest, RequestTooLarge

CONTENT = b'{"custom_id": "a"}\r\n--not-it\r\n\x00\xff' * 40
TYPE = "multipart/form-data; boundary=xyz"
Part = tuple[str, str | None, bytes]
PURPOSE: Part = ("purpose", None, b"batch")
FILE: Part = ("file", "rows.jsonl", CONTENT)


def form(*parts: Part) -> bytes:
    pieces = []
    for name, filename, value in parts:
        of_file = "" if filename is None else f'; filename="{filename}"'
        pieces.append(f'--xyz\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'.encode() + value)
    return b"\r\n".join(pieces) + b"\r\n--xyz--\r\n"


async def received(folder: Path, body: bytes, cuts: list[int] | None = None, kind: str = TYPE) -> Upload:
    bounds = [0, *sorted(cuts or ()), len(body)]

    async def pieces() -> AsyncIterator[HttpBody]:
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            yield HttpBody(content_type=kind if number == 0 else "", data=body[begin:end])

    upload = Upload(folder, 10_000)
    await upload.receive(pieces())
    return upload


async def test_upload_keeps_the_bytes_of_its_file(tmp_path: Path) -> None:
    upload = await received(tmp_path, form(PURPOSE, FILE))
    assert upload.path.read_bytes() == CONTENT
    assert (upload.purpose, upload.filename, upload.expires_s) == ("batch", "rows.jsonl", None)


BODY = form(FILE, PURPOSE)


@given(cuts=st.lists(st.integers(0, len(BODY)), max_size=8))
async def test_upload_in_any_pieces_is_the_same(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp()
    upload = await received(folder, BODY, cuts)
    assert upload.path.read_bytes() == CONTENT
    upload.path.unlink()


async def test_upload_says_when_its_file_expires(tmp_path: Path) -> None:
    fields: list[Part] = [("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"3600")]
    assert (await received(tmp_path, form(PURPOSE, *fields, FILE))).expires_s == 3600


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (form(PURPOSE), "file"),
        (form(PURPOSE, FILE, FILE), "file"),
        (form(PURPOSE, FILE, ("colour", None, b"red")), "colour"),
        (form(("purpose", None, b"x" * (FIELD_BYTES_MAX + 1)), FILE), "purpose"),
        (form(*[PURPOSE] * (PARTS_MAX + 1)), "body"),
        (form(PURPOSE, FILE)[:-10], "body"),
        (b"{}", "body"),
        (b"", "body"),
    ],
)
async def test_upload_that_is_wrong_names_the_field(tmp_path: Path, body: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await received(tmp_path, body)
    assert refused.value.field == field


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "multipart/mixed; boundary=xyz", ""])
async def test_upload_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="multipart"):
        await received(tmp_path, form(PURPOSE, FILE), kind=kind)


@pytest.mark.parametrize(
    "fields",
    [
        [("expires_after[anchor]", None, b"now"), ("expires_after[seconds]", None, b"3600")],
        [("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"60")],
        [("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"soon")],
        [("expires_after[seconds]", None, b"3600")],
    ],
)
async def test_upload_with_a_wrong_expiry_is_refused(tmp_path: Path, fields: list[Part]) -> None:
    upload = await received(tmp_path, form(PURPOSE, *fields, FILE))
    with pytest.raises(InvalidRequest, match="expires_after"):
        _ = upload.expires_s


async def test_upload_beyond_the_limit_is_refused_before_it_is_whole(tmp_path: Path) -> None:
    asked = 0

    async def pieces() -> AsyncIterator[HttpBody]:
        nonlocal asked
        yield HttpBody(content_type=TYPE, data=form(PURPOSE, FILE)[:-10])
        while True:
            asked += 1
            yield HttpBody(data=b"x" * 1_000)

    with pytest.raises(RequestTooLarge):
        await Upload(tmp_path, 10_000).receive(pieces())
    assert asked < 12


async def test_upload_has_a_file_name_without_a_path(tmp_path: Path) -> None:
    upload = await received(tmp_path, form(PURPOSE, ("file", "../../etc/passwd", b"x")))
    assert "/" not in upload.filename
