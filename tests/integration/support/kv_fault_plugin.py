"""Runs in SGLang's scheduler: damages the KV of hand-overs whose prompt asks for it, each prompt once.

`kv_faults.plug_in` copies this file into a distribution of its own, so it imports nothing of the tests. A prompt asks
by its first tokens, MARK and the number of the kind. That a fault fired is a file in the directory FIRED.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import random
import threading
from pathlib import Path
from typing import Any

MARK = (7, 7, 7)
KINDS = ("bit", "page", "late_write", "wrong_page", "missing_page")
"""The last two are done to what prefill sends, the others to what decode has received when it is about to check."""
AT_PREFILL = ("wrong_page", "missing_page")
FIRED = "TANDEM_TEST_KV_FAULTS"

_sending = threading.local()
_restore: list[tuple[int, bytes]] = []
_others: list[int] = []
"""Pages that prefill has sent, of the latest requests."""
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_MANAGER = "sglang.srt.disaggregation.nixl.conn.NixlKVManager"


def register() -> None:
    """SGLang's entry point."""
    if multiprocessing.parent_process() is None or FIRED not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, hook, kind in (
        (f"{_SCHEDULER}._verify_kv_checksums", damage, HookType.BEFORE),
        (f"{_SCHEDULER}._verify_kv_checksums", arrive_late, HookType.AFTER),
        (f"{_SCHEDULER}._send_kv_chunk", note_sent, HookType.BEFORE),
        (f"{_MANAGER}.add_transfer_request", redirect, HookType.BEFORE),
    ):
        HookRegistry.register(name, hook, kind)


def _asked(request: Any, kinds: tuple[str, ...]) -> str | None:
    """The kind of fault that this request asks for, if it is one of these."""
    tokens = tuple(request.origin_input_ids[: len(MARK) + 1])
    if tokens[:-1] != MARK or tokens[-1] >= len(KINDS):
        return None
    kind = KINDS[tokens[-1]]
    return kind if kind in kinds else None


def _first_time(request: Any, kind: str) -> bool:
    name = hashlib.sha256(repr(list(request.origin_input_ids)).encode()).hexdigest()[:16]
    try:
        Path(os.environ[FIRED], f"{kind}-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def damage(scheduler: Any, batch: Any) -> None:
    """On decode, before the comparison."""
    here = tuple(kind for kind in KINDS if kind not in AT_PREFILL)
    for request in batch.reqs:
        kind = _asked(request, here)
        if kind is not None and _first_time(request, kind):
            _damage(scheduler, request, kind)


def _damage(scheduler: Any, request: Any, kind: str) -> None:
    computer, page = scheduler.kv_checksum_computer, scheduler.token_to_kv_pool_allocator.page_size
    held = request.kv.cache_protected_len
    rows = scheduler.req_to_token_pool.req_to_token[request.kv.req_pool_idx, held : len(request.origin_input_ids)]
    at = random.randrange(len(rows))
    if kind == "bit":
        buffer = random.randrange(len(computer._kv_data_ptrs))
        width = computer._kv_item_lens[buffer] // page
        address = computer._kv_data_ptrs[buffer] + int(rows[at]) * width + random.randrange(width)
        _write(address, bytes([_read(address, 1)[0] ^ 1 << random.randrange(8)]))
        return
    for pointer, item_bytes in zip(computer._kv_data_ptrs, computer._kv_item_lens, strict=True):
        width = item_bytes // page
        # The rows of one page, as far as they are of this request.
        first = at // page * page
        for row in rows[first : first + page].tolist():
            address = pointer + row * width
            if kind == "late_write":
                _restore.append((address, _read(address, width)))
            _write(address, random.randbytes(width) if kind == "page" else bytes(width))


def arrive_late(result: None, scheduler: Any, batch: Any) -> None:
    """On decode, after the comparison: what was late arrives, in pages that may be another request's by now."""
    while _restore:
        _write(*_restore.pop())


def note_sent(scheduler: Any, request: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
    """On prefill: the request whose pages are about to be queued."""
    _sending.request = request if last_chunk else None


def redirect(
    manager: Any, bootstrap_room: int, kv_indices: Any, index_slice: slice, *arguments: Any, **keywords: Any
) -> Any:
    """On prefill: send another request's page in place of one, or leave one out."""
    request = getattr(_sending, "request", None)
    kind = None if request is None else _asked(request, AT_PREFILL)
    foreign = [index for index in _others if index not in kv_indices]
    _others[:] = [*_others, *kv_indices.tolist()][-64:]
    if kind is None or (kind == "wrong_page" and not foreign) or not _first_time(request, kind):
        return None
    changed = kv_indices.copy()
    if kind == "wrong_page":
        changed[random.randrange(len(changed))] = random.choice(foreign)
    else:
        changed, index_slice = changed[:-1], slice(index_slice.start, index_slice.stop - 1)
    return (manager, bootstrap_room, changed, index_slice, *arguments), keywords


def _read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _write(address: int, content: bytes) -> None:
    ctypes.memmove(address, content, len(content))
