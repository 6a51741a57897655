"""Checks of the messages that arrive at an engine's hand-over port, before SGLang's code reads them.

SGLang's receiving threads end at the first message they cannot read: on prefill every later hand-over then waits until
its timeout. The formats are those of SGLang 0.5.23, `nixl/conn.py` and `common/conn.py`; engines of other versions are
no peers. Owns no socket and changes nothing.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Sequence
from typing import Any

from tandem.domain.handover import DropReason

GUARD = b"NixlMsgGuard"
STATUS_FRAMES = 5
"""Frames of SGLang's status message: tag, room, status, rank, reason. Tandem appends a sixth: the bytes transferred."""
REGISTRATION_FRAMES = 25
REQUEST_FRAMES = 11
ROOM_MAX = 2**63 - 1
COUNT_MAX = 2**31 - 1
SIZE_MAX = 2**63 - 1
RANKS_MAX = 2**16
NAME_BYTES_MAX = 256
DIGITS_MAX = 19

Frames = Sequence[bytes]
Check = Callable[[Frames, Any], DropReason | None]


class MalformedFrame(ValueError):
    """A frame that is not what its place in the message requires."""


def check_at_prefill(frames: Frames, manager: Any) -> DropReason | None:
    """Why a prefill engine must drop this message; None: SGLang can read it.

    Args:
        frames: the parts of the message.
        manager: SGLang's NixlKVManager; its registered peers and rooms are read.
    """
    return _checked(_PREFILL, frames, manager)


def check_at_decode(frames: Frames, manager: Any) -> DropReason | None:
    """The same of a decode engine."""
    return _checked(_DECODE, frames, manager)


def _checked(checks: dict[bytes, Check], frames: Frames, manager: Any) -> DropReason | None:
    check = checks.get(frames[0]) if frames else None
    if check is None:
        return DropReason.FOREIGN
    try:
        return check(frames, manager)
    except ValueError:
        return DropReason.MALFORMED


# --- At prefill


def _guarded(frames: Frames, manager: Any) -> DropReason | None:
    return _registration(frames) if frames[1:2] == [b"None"] else _request(frames, manager)


def _registration(frames: Frames) -> DropReason | None:
    """A decode engine's addresses. The metadata of its agent can be read by NIXL only, which may refuse it."""
    _require(len(frames) == REGISTRATION_FRAMES)
    _address(frames[2], frames[3])
    _name(frames[4])
    _require(bool(frames[5]))
    pointers = _numbers(frames[6], 8)
    _numbers(frames[7], 8)
    for at, width in ((8, 8), (13, 4), (14, 4), (20, 4), (24, 8)):
        _lists(frames[at], width)
    # GPU, tensor-parallel size and rank, bytes of a page.
    _number(frames[9], COUNT_MAX)
    _require(_number(frames[10], RANKS_MAX) > 0)
    _number(frames[11], RANKS_MAX)
    _number(frames[12], SIZE_MAX)
    # The staging buffer: its address and size, or both empty.
    _require(len(frames[15]) in (0, 8))
    if frames[16]:
        _number(frames[16], SIZE_MAX)
    _number(frames[17], COUNT_MAX)
    kinds = frames[18].split(b",") if frames[18] else []
    _require(all(kind in (b"VRAM", b"DRAM") for kind in kinds) and len(kinds) in (0, pointers))
    _require(_numbers(frames[19], 8) in (0, pointers))
    _numbers(frames[21], 4)
    _require(_number(frames[22], RANKS_MAX) > _number(frames[23], RANKS_MAX))
    return None


def _request(frames: Frames, manager: Any) -> DropReason | None:
    """The pages of one request, from a decode engine that has registered before on the same connection."""
    _require(len(frames) == REQUEST_FRAMES)
    room = _number(frames[1], ROOM_MAX)
    address = _address(frames[2], frames[3])
    name = _name(frames[4])
    pages = struct.unpack(f"={_numbers(frames[5], 4)}i", frames[5])
    _number(frames[6], COUNT_MAX)
    _require(_number(frames[7], RANKS_MAX) > 0)
    _lists(frames[8], 4)
    _number(frames[9], COUNT_MAX)
    _require(frames[10] in (b"0", b"1"))
    peer = manager.decode_kv_args_table.get(name)
    if peer is None or (peer.endpoint, peer.dst_port) != address:
        return DropReason.UNKNOWN_PEER
    # Numbers of a decode-context-parallel engine count the pages of all its ranks.
    pages_end = peer.dst_num_slots if peer.dst_dcp_size == 1 else None
    _require(not pages or (min(pages) >= 0 and max(pages) < (pages_end or COUNT_MAX)))
    earlier = manager.transfer_infos.get(room, {}).get(name)
    if earlier is not None and len(earlier.dst_kv_indices) != len(pages):
        return DropReason.REFUSED
    return None


def _abort(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) in (2, 4, 5))
    _number(frames[1], ROOM_MAX)
    if len(frames) == 2:
        return None
    address = _address(frames[2], frames[3])
    if len(frames) == 5:
        _number(frames[4], SIZE_MAX)
    # SGLang answers at this address, over a socket that it then keeps.
    peers = list(manager.decode_kv_args_table.values())
    return None if any((peer.endpoint, peer.dst_port) == address for peer in peers) else DropReason.UNKNOWN_PEER


def _watermark(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) in (3, 4))
    for frame in frames[1:3]:
        _number(frame, SIZE_MAX)
    if len(frames) == 4:
        _text(frames[3])
    return None


def _staging_response(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) == 7)
    _number(frames[1], ROOM_MAX)
    for frame in frames[2:6]:
        _number(frame, SIZE_MAX, signed=True)
    _text(frames[6])
    return None


# --- At decode


def _status(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) in (STATUS_FRAMES, STATUS_FRAMES + 1))
    _number(frames[1], ROOM_MAX)
    _number(frames[2], RANKS_MAX)
    _number(frames[3], RANKS_MAX)
    if len(frames) > STATUS_FRAMES:
        _number(frames[STATUS_FRAMES], SIZE_MAX)
    return None


def _abort_answer(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) in (3, 4))
    _number(frames[1], ROOM_MAX)
    _number(frames[2], RANKS_MAX)
    if len(frames) == 4:
        _number(frames[3], SIZE_MAX)
    return None


def _chunk_ready(frames: Frames, manager: Any) -> DropReason | None:
    _require(len(frames) == 7)
    _number(frames[1], ROOM_MAX)
    for frame in (*frames[2:5], frames[6]):
        _number(frame, COUNT_MAX)
    _text(frames[5])
    return None


def _staging_request(frames: Frames, manager: Any) -> DropReason | None:
    """Read by a method that `handover_port` guards; without staging nothing reads it."""
    _require(len(frames) > 1)
    return None if manager.enable_staging else DropReason.FOREIGN


_PREFILL: dict[bytes, Check] = {
    GUARD: _guarded,
    b"ABORT": _abort,
    b"WATERMARK": _watermark,
    b"STAGING_RSP": _staging_response,
}
_DECODE: dict[bytes, Check] = {
    b"KV_STATUS": _status,
    b"ABORT_ACK": _abort_answer,
    b"CHUNK_READY": _chunk_ready,
    b"STAGING_REQ": _staging_request,
}


# --- Frames


def _require(is_right: bool) -> None:
    if not is_right:
        raise MalformedFrame


def _text(frame: bytes) -> str:
    return frame.decode("ascii")


def _number(frame: bytes, largest: int, *, signed: bool = False) -> int:
    """A decimal number; no sign, space or underscore, which Python's `int` would accept."""
    digits = frame.removeprefix(b"-") if signed else frame
    _require(0 < len(digits) <= DIGITS_MAX and digits.isdigit())
    number = int(frame)
    _require(number <= largest)
    return number


def _address(host: bytes, port: bytes) -> tuple[str, int]:
    text = _text(host)
    ipaddress.ip_address(text)
    number = _number(port, 65_535)
    _require(number > 0)
    return text, number


def _name(frame: bytes) -> str:
    _require(0 < len(frame) <= NAME_BYTES_MAX)
    return _text(frame)


def _numbers(frame: bytes, width: int) -> int:
    """How many binary numbers the frame holds."""
    _require(len(frame) % width == 0)
    return len(frame) // width


def _lists(frame: bytes, width: int) -> None:
    """Packed lists: their count, the length of each in bytes, their numbers. An empty frame is no list."""
    if not frame:
        return
    _require(len(frame) >= 4)
    (count,) = struct.unpack_from("<I", frame)
    _require(count <= (len(frame) - 4) // 4)
    lengths = struct.unpack_from(f"<{count}I", frame, 4)
    _require(4 + 4 * count + sum(lengths) == len(frame) and all(length % width == 0 for length in lengths))
