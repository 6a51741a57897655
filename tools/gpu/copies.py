"""Bandwidth of NIXL transfers between two processes, compared with a plain copy of the same bytes.

The receiver runs in its own process, as a decode engine does. The plain copy is PyTorch's, in one process, between the
same two devices.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from tools.gpu.summaries import quantile

MIB = 2**20
SIZES_BYTES = (1 * MIB, 16 * MIB, 128 * MIB, 1024 * MIB)
REPEATS = 8
PIECES = (1, 64, 1024)
"""Into how many equal parts the bytes are cut: KV pages of many layers are many parts."""
TIMEOUT_S = 60.0

Part = tuple[int, int, int]
"""Address, size in bytes and device of a piece of memory."""


def measure(places: tuple[str, str], sizes_bytes: tuple[int, ...] = SIZES_BYTES) -> dict[str, Any]:
    """GB/s of both, for each size and number of pieces; the median of several."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs, places[1], max(sizes_bytes)), daemon=True)
    receiver.start()
    try:
        nixl = _send(mine, places[0], sizes_bytes)
    finally:
        mine.send(None)
        receiver.join(10)
        if receiver.is_alive():
            receiver.kill()
    return {"from": places[0], "to": places[1], "nixl": nixl, "copy": plain(places, sizes_bytes)}


def plain(places: tuple[str, str], sizes_bytes: tuple[int, ...]) -> list[dict[str, Any]]:
    """PyTorch's own copy."""
    import torch

    rows = []
    for size_bytes in sizes_bytes:
        source = _filled(size_bytes, places[0])
        target = torch.empty_like(source, device=places[1])
        times_s = []
        for _ in range(REPEATS + 2):
            _wait(places)
            begin_s = time.perf_counter()
            target.copy_(source)
            _wait(places)
            times_s.append(time.perf_counter() - begin_s)
        rows.append(_row(size_bytes, 1, times_s[2:]))
    return rows


def _row(size_bytes: int, pieces: int, times_s: list[float]) -> dict[str, Any]:
    median_s = quantile(times_s, 0.5)
    return {
        "bytes": size_bytes,
        "pieces": pieces,
        "ms": round(1e3 * median_s, 4),
        "gbytes_per_s": round(size_bytes / median_s / 1e9, 2),
    }


def _send(peer: Connection, place: str, sizes_bytes: tuple[int, ...]) -> dict[str, Any]:
    source = _filled(max(sizes_bytes), place)
    agent = _agent("sender", place)
    agent.register_memory([_region(source.data_ptr(), source.numel(), place)], mem_type=_kind(place))
    if not peer.poll(TIMEOUT_S):
        raise TimeoutError("the receiver process did not respond in time")
    name_bytes, address, device = peer.recv()
    name = agent.add_remote_agent(name_bytes)
    rows, wrong = [], 0
    for size_bytes in sizes_bytes:
        for pieces in PIECES:
            part = size_bytes // pieces
            ours = _parts(source.data_ptr(), part, pieces, place)
            others = [(address + number * part, part, device) for number in range(pieces)]
            times_s = [_write(agent, name, ours, others, _kind(place)) for _ in range(REPEATS + 2)]
            rows.append(_row(size_bytes, pieces, times_s[2:]))
        peer.send(size_bytes)
        wrong += peer.recv() != int(source[:size_bytes].long().sum())
    return {"rows": rows, "wrong_sums": wrong, "backends": list(agent.backends) if hasattr(agent, "backends") else []}


def _write(agent: Any, name: str, ours: list[Part], others: list[Part], kind: str) -> float:
    local = agent.get_xfer_descs(ours, mem_type=kind)
    remote = agent.get_xfer_descs(others, mem_type=kind)
    handle = agent.initialize_xfer("WRITE", local, remote, name, b"")
    begin_s = time.perf_counter()
    state = agent.transfer(handle)
    while state not in ("DONE", "ERR"):
        if time.perf_counter() - begin_s > TIMEOUT_S:
            raise TimeoutError("the NIXL write did not complete in time")
        state = agent.check_xfer_state(handle)
    took_s = time.perf_counter() - begin_s
    if state == "ERR":
        raise RuntimeError("the NIXL write failed")
    agent.release_xfer_handle(handle)
    return took_s


def _receive(peer: Connection, place: str, size_bytes: int) -> None:
    import torch

    target = torch.zeros(size_bytes, dtype=torch.uint8, device=place)
    agent = _agent("receiver", place)
    agent.register_memory([_region(target.data_ptr(), size_bytes, place)], mem_type=_kind(place))
    peer.send((agent.get_agent_metadata(), target.data_ptr(), _device_id(place)))
    while (length := peer.recv()) is not None:
        _wait((place, place))
        peer.send(int(target[:length].long().sum()))


def _agent(name: str, place: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if place != "cpu":
        import torch

        torch.cuda.set_device(place)
    return nixl_agent(f"{name}-{os.getpid()}", nixl_agent_config(backends=["UCX"]))


def _filled(size_bytes: int, place: str) -> Any:
    import torch

    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, device=place)


def _region(address: int, size_bytes: int, place: str) -> tuple[int, int, int, str]:
    return (address, size_bytes, _device_id(place), "")


def _parts(address: int, part_bytes: int, pieces: int, place: str) -> list[tuple[int, int, int]]:
    return [(address + number * part_bytes, part_bytes, _device_id(place)) for number in range(pieces)]


def _kind(place: str) -> str:
    return "DRAM" if place == "cpu" else "VRAM"


def _device_id(place: str) -> int:
    return int(place.partition(":")[2] or 0)


def _wait(places: tuple[str, str]) -> None:
    import torch

    for place in set(places) - {"cpu"}:
        torch.cuda.synchronize(place)
