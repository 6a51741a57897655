"""The check of messages at an engine's hand-over port: real ones pass, and whatever differs from them is dropped."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.domain.handover import DropReason
from tandem.engine.sglang.hooks.handover_messages import GUARD, check_at_decode, check_at_prefill

ROOM = 2**62 + 17
NAME = "agent-1"


def packed(*lists: list[int], form: str = "i") -> bytes:
    buffers = [struct.pack(f"<{len(numbers)}{form}", *numbers) for numbers in lists]
    return struct.pack(f"<{1 + len(buffers)}I", len(buffers), *map(len, buffers)) + b"".join(buffers)


def registration(**changes: bytes) -> list[bytes]:
    """As `NixlKVManager.build_receiver_registration_message` makes it, of two layers."""
    frames = {
        "guard": GUARD,
        "room": b"None",
        "ip": b"127.0.0.1",
        "port": b"40001",
        "name": NAME.encode(),
        "metadata": b"nixlSerDes|...",
        "kv_ptrs": struct.pack("4Q", 1, 2, 3, 2**64 - 1),
        "aux_ptrs": struct.pack("1Q", 5),
        "state_ptrs": packed(),
        "gpu": b"0",
        "tp_size": b"1",
        "rank": b"0",
        "item_len": b"1024",
        "state_item_lens": b"",
        "state_dims": packed([1, 2], form="I"),
        "staging_base": b"",
        "staging_size": b"",
        "slots": b"16384",
        "kinds": b"DRAM,DRAM,DRAM,DRAM",
        "item_lens": struct.pack("4Q", 1024, 1024, 1024, 1024),
        "state_layers": packed(),
        "kv_layers": struct.pack("2I", 0, 1),
        "dcp_size": b"1",
        "dcp_rank": b"0",
        "state_lens": packed(),
    }
    return list((frames | changes).values())


def asked(**changes: bytes) -> list[bytes]:
    """As `NixlKVManager.build_receiver_metadata_message` makes it, of three pages."""
    frames = {
        "guard": GUARD,
        "room": str(ROOM).encode(),
        "ip": b"127.0.0.1",
        "port": b"40001",
        "name": NAME.encode(),
        "pages": struct.pack("3i", 7, 8, 16383),
        "aux": b"3",
        "required": b"1",
        "state": b"",
        "prefix": b"0",
        "dummy": b"0",
    }
    return list((frames | changes).values())


def abort(*more: bytes) -> list[bytes]:
    return [b"ABORT", str(ROOM).encode(), *more]


def status(*more: bytes) -> list[bytes]:
    return [b"KV_STATUS", str(ROOM).encode(), b"4", b"0", b"", *more]


@pytest.fixture
def manager() -> Any:
    """A manager that knows one peer, and no room."""
    peer = SimpleNamespace(endpoint="127.0.0.1", dst_port=40001, dst_num_slots=16384, dst_dcp_size=1)
    return SimpleNamespace(decode_kv_args_table={NAME: peer}, transfer_infos={}, enable_staging=False)


REAL_AT_PREFILL = {
    "registration": registration(),
    "request": asked(),
    "request of no page": asked(pages=b"", prefix=b"64"),
    "dummy": asked(pages=b"", dummy=b"1"),
    "abort": abort(),
    "abort with address": abort(b"127.0.0.1", b"40001"),
    "abort to be answered": abort(b"127.0.0.1", b"40001", b"9"),
    "watermark": [b"WATERMARK", b"1", b"4096", b"session"],
    "staging": [b"STAGING_RSP", b"1", b"0", b"4096", b"-1", b"0", b"session"],
}
REAL_AT_DECODE = {
    "status": status(),
    "status with bytes": status(b"1048576"),
    "failed": [b"KV_STATUS", str(ROOM).encode(), b"0", b"0", "the engine’s reason".encode()],
    "abort answered": [b"ABORT_ACK", str(ROOM).encode(), b"0", b"12"],
    "chunk": [b"CHUNK_READY", str(ROOM).encode(), b"0", b"0", b"16", b"writer", b"0"],
}


@pytest.mark.parametrize("name", REAL_AT_PREFILL)
def test_prefill_takes_a_real_message(manager: Any, name: str) -> None:
    assert check_at_prefill(REAL_AT_PREFILL[name], manager) is None


@pytest.mark.parametrize("name", REAL_AT_DECODE)
def test_decode_takes_a_real_message(manager: Any, name: str) -> None:
    assert check_at_decode(REAL_AT_DECODE[name], manager) is None


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"hello"],
        [b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"\x16\x03\x01\x02\x00", b"\x01"],
        [GUARD + b" "],
        [GUARD.lower(), b"None"],
        [b"\xff" * 65_536],
        *([b"junk"] * count for count in range(1, 21)),
    ],
)
def test_another_protocol_is_foreign(manager: Any, frames: list[bytes]) -> None:
    assert check_at_prefill(frames, manager) is DropReason.FOREIGN
    assert check_at_decode(frames, manager) is DropReason.FOREIGN


@pytest.mark.parametrize("name", REAL_AT_PREFILL)
def test_a_truncated_message_is_malformed_at_prefill(manager: Any, name: str) -> None:
    whole = REAL_AT_PREFILL[name]
    complete = [REAL_AT_PREFILL[other] for other in ("abort", "abort with address")] + [whole[:3]] * (
        whole[0] == b"WATERMARK"
    )
    for count in range(1, len(whole)):
        if whole[:count] not in complete:
            assert check_at_prefill(whole[:count], manager) is DropReason.MALFORMED, count


@pytest.mark.parametrize("name", REAL_AT_DECODE)
def test_a_truncated_message_is_malformed_at_decode(manager: Any, name: str) -> None:
    whole = REAL_AT_DECODE[name]
    shortest = {b"KV_STATUS": 5, b"ABORT_ACK": 3, b"CHUNK_READY": 7}[whole[0]]
    for count in range(1, shortest):
        assert check_at_decode(whole[:count], manager) is DropReason.MALFORMED, count


@pytest.mark.parametrize("whole", [registration(), asked(), status(b"1"), REAL_AT_DECODE["chunk"]], ids=len)
def test_more_frames_are_malformed(manager: Any, whole: list[bytes]) -> None:
    check = check_at_decode if whole[0] in (b"KV_STATUS", b"CHUNK_READY") else check_at_prefill
    assert check([*whole, b""], manager) is DropReason.MALFORMED


@pytest.mark.parametrize(
    "number", [b"", b"x", b"-1", b" 1", b"1_0", b"1.0", b"\xb2", b"9" * 5_000, str(2**63).encode()]
)
def test_a_number_that_is_none_is_malformed(manager: Any, number: bytes) -> None:
    for field in ("port", "aux", "required", "prefix", "dummy", "room"):
        assert check_at_prefill(asked(**{field: number}), manager) is DropReason.MALFORMED, field
    for field in ("port", "gpu", "tp_size", "rank", "item_len", "slots", "dcp_size", "dcp_rank"):
        assert check_at_prefill(registration(**{field: number}), manager) is DropReason.MALFORMED, field
    for at in (1, 2, 3, 5):
        frames = status(b"1")
        frames[at] = number
        assert check_at_decode(frames, manager) is DropReason.MALFORMED, at
    assert check_at_prefill([b"ABORT", number], manager) is DropReason.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"ip": b"not an address"},
        {"ip": b"\xff\xfe"},
        {"port": b"0"},
        {"port": b"65536"},
        {"name": b""},
        {"name": b"\xff"},
        {"name": b"a" * 257},
        {"metadata": b""},
        {"kv_ptrs": b"1234567"},
        {"kinds": b"DRAM"},
        {"kinds": b"DISK,DRAM,DRAM,DRAM"},
        {"item_lens": struct.pack("3Q", 1, 1, 1)},
        {"staging_base": b"1234"},
        {"state_ptrs": b"\x01"},
        {"state_ptrs": struct.pack("<I", 2**32 - 1)},
        {"state_ptrs": struct.pack("<2I", 1, 2**32 - 1)},
        {"state_lens": packed([1, 2, 3])},
        {"tp_size": b"0"},
        {"dcp_rank": b"1"},
    ],
    ids=str,
)
def test_a_registration_with_a_wrong_frame_is_malformed(manager: Any, change: dict[str, bytes]) -> None:
    assert check_at_prefill(registration(**change), manager) is DropReason.MALFORMED


@pytest.mark.parametrize(
    "change",
    [
        {"pages": b"123"},
        {"pages": struct.pack("1i", 16384)},
        {"pages": struct.pack("1i", -1)},
        {"required": b"0"},
        {"state": b"\x05\x00\x00\x00"},
        {"dummy": b"2"},
    ],
    ids=str,
)
def test_a_request_with_a_wrong_frame_is_malformed(manager: Any, change: dict[str, bytes]) -> None:
    assert check_at_prefill(asked(**change), manager) is DropReason.MALFORMED


def test_only_a_registered_engine_may_ask(manager: Any) -> None:
    for change in ({"name": b"agent-2"}, {"port": b"40002"}, {"ip": b"127.0.0.2"}):
        assert check_at_prefill(asked(**change), manager) is DropReason.UNKNOWN_PEER
    assert check_at_prefill(abort(b"127.0.0.2", b"40001"), manager) is DropReason.UNKNOWN_PEER


def test_other_pages_for_a_known_room_are_refused(manager: Any) -> None:
    manager.transfer_infos[ROOM] = {NAME: SimpleNamespace(dst_kv_indices=[7, 8, 9])}
    assert check_at_prefill(asked(), manager) is None
    assert check_at_prefill(asked(pages=struct.pack("2i", 7, 8)), manager) is DropReason.REFUSED


def test_staging_requests_are_foreign_without_staging(manager: Any) -> None:
    request = [b"STAGING_REQ", b"1", b"2"]
    assert check_at_decode(request, manager) is DropReason.FOREIGN
    manager.enable_staging = True
    assert check_at_decode(request, manager) is None


def test_no_message_raises_whatever_a_frame_holds(manager: Any) -> None:
    draw = random.Random(17)
    real = [*REAL_AT_PREFILL.values(), *REAL_AT_DECODE.values()]
    for _ in range(5_000):
        frames = list(draw.choice(real))
        for _ in range(draw.randint(1, 3)):
            frames[draw.randrange(1, len(frames))] = draw.randbytes(draw.choice((0, 1, 3, 4, 8, 40)))
        if draw.random() < 0.3:
            frames = frames[: draw.randint(1, len(frames))]
        check_at_prefill(frames, manager)
        check_at_decode(frames, manager)
