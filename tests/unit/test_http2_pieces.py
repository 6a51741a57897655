"""Parts of the server on h2 without a socket: messages from bytes, headers and their spelling, budgets."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
from hpack.hpack import Decoder
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest, RequestTooLarge
from tandem.rpc.http2.framing import header_block
from tandem.rpc.http2.limits import Budget
from tandem.rpc.http2.message_reader import MessageReader, unpack
from tandem.rpc.http2.metadata import (
    HttpRefusal,
    Malformed,
    read_request,
    sent_fields,
    status_block,
)

HEADERS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a.B/C"),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
]


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=300)), max_size=8), st.data())
def test_messages_are_the_same_however_their_bytes_come(
    messages: list[tuple[bool, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(bytes([packed]) + len(message).to_bytes(4, "big") + message for packed, message in messages)
    reader, found = MessageReader(300, may_be_compressed=True), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        piece, stream = stream[:size], stream[size:]
        found += reader.feed(piece)
    assert found == messages
    assert reader.held_bytes == 0
    reader.finish()


@given(st.binary(min_size=1, max_size=4))
def test_a_prefix_alone_is_no_message(beginning: bytes) -> None:
    reader = MessageReader(10, may_be_compressed=True)
    assert reader.feed(beginning) == []
    with pytest.raises(InvalidRequest, match="ended in the middle"):
        reader.finish()


def test_a_message_is_refused_by_its_prefix() -> None:
    reader = MessageReader(10, may_be_compressed=False)
    with pytest.raises(RequestTooLarge) as refusal:
        reader.feed(b"\x00\x00\x00\x00\x0b")
    assert refusal.value.metadata == {"field": "request", "limit": "10"}
    for flag in (1, 2, 255):
        with pytest.raises(InvalidRequest, match="not framed"):
            MessageReader(10, may_be_compressed=False).feed(bytes([flag, 0, 0, 0, 1]))


@given(st.binary(max_size=2_000))
def test_a_compressed_message_is_unpacked_up_to_its_bound(message: bytes) -> None:
    packed = gzip.compress(message)
    assert unpack(packed, len(message)) == message
    if message:
        with pytest.raises(RequestTooLarge):
            unpack(packed, len(message) - 1)
    for broken in (packed[:-1], packed + b"\x00", packed[1:], b""):
        with pytest.raises(InvalidRequest):
            unpack(broken, 10**6)


def test_a_bomb_is_unpacked_no_further_than_its_bound() -> None:
    packed = gzip.compress(bytes(2**26))
    assert len(packed) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(RequestTooLarge):
            unpack(packed, 2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


FIELDS = st.lists(
    st.tuples(st.from_regex(rb"[a-z][a-z0-9-]{0,200}", fullmatch=True), st.binary(max_size=400)), max_size=5
)


@given(st.none() | st.sampled_from([200, 404, 415, 503]), FIELDS)
def test_any_decoder_reads_our_header_blocks_and_remembers_nothing(
    status: int | None, fields: list[tuple[bytes, bytes]]
) -> None:
    decoder = Decoder()
    own = [] if status is None else [(b":status", b"%d" % status)]
    for _ in range(2):
        assert [tuple(field) for field in decoder.decode(header_block(status, fields), raw=True)] == own + fields
    assert not decoder.header_table.dynamic_entries


def test_a_header_block_has_a_bound() -> None:
    with pytest.raises(ValueError, match="more than 16384"):
        header_block(200, [(b"x", bytes(17_000))])


@given(st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=12)), max_size=6))
def test_no_headers_do_more_than_be_refused(fields: list[tuple[bytes, bytes]]) -> None:
    for headers in (fields, [*HEADERS, *fields], [*fields, *HEADERS]):
        try:
            request = read_request(headers)
        except (Malformed, HttpRefusal, InvalidRequest):
            continue
        try:
            names = [name for name, _ in request.metadata()]
        except InvalidRequest:
            continue
        assert not any(name.startswith(":") for name in names)


@given(st.dictionaries(st.from_regex(r"x-[a-z0-9-]{0,10}-bin", fullmatch=True), st.binary(max_size=50), max_size=4))
def test_binary_metadata_comes_back_as_it_was(metadata: dict[str, bytes]) -> None:
    request = read_request([*HEADERS, *sent_fields(list(metadata.items()))])
    assert dict(request.metadata()) == metadata


@pytest.mark.parametrize(("text", "seconds"), [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 4e-3), (b"5u", 5e-6)])
def test_timeouts(text: bytes, seconds: float) -> None:
    assert read_request([*HEADERS, (b"grpc-timeout", text)]).timeout_s == pytest.approx(seconds)


@pytest.mark.parametrize("key", ["", "X", "a b", "grpc-status", "a:b", "é"])
def test_names_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        sent_fields([(key, "x")])


@given(st.text())
def test_messages_of_a_status_are_spelt_in_printable_ascii(message: str) -> None:
    decoded = dict(Decoder().decode(status_block(5, message, (), opens=False), raw=True))
    spelt = decoded.get(b"grpc-message", b"")
    assert all(0x20 <= byte < 0x7F for byte in spelt)
    assert not spelt.startswith(b" ")
    assert not spelt.endswith(b" ")
    assert bool(spelt) == bool(message)


def test_a_budget_is_spent_at_once_and_fills_again_with_time() -> None:
    budget = Budget(3, 2)
    assert [budget.spend(100.0) for _ in range(4)] == [True, True, True, False]
    assert [budget.spend(101.0) for _ in range(3)] == [True, True, False]
    assert [budget.spend(1_000.0) for _ in range(4)] == [True, True, True, False]
    assert budget.spend(1_000.0, -1)
    assert budget.spend(1_000.0)
    assert not budget.spend(1_000.0)
    assert not budget.spend(1_001.0, 3), "what is refused takes nothing"
    assert budget.spend(1_001.0, 2)
