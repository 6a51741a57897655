"""In the scheduler: the digests by which a decode engine checks that the KV that arrived is the KV that was sent.

SGLang has the places: prefill writes a digest of a request's KV into the metadata that follows its last chunk, and
decode compares it with its own when the request enters the batch, before anything is computed from its KV. It compares
whole pages, on a GPU, for all requests or none. Here the digest covers the rows of the tokens that are handed over, in
their order, so it depends on neither the size of the pages nor their place; it is computed on a CPU too; and a share of
the requests can be checked. Each rank has its own digest, and ranks agree on what they drop, as in SGLang.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.domain.kv_sample import is_sampled
from tandem.engine.sglang.environment import KV_CHECK_SHARE

log = logging.getLogger(__name__)

ALGORITHMS = {"cpu": "tandem-xxh3-64", "cuda": "tandem-adler32"}
"""Part of the signature that both sides compare first: another one is not comparable, and means no check."""
NO_DIGEST = 0
"""SGLang's: prefill has computed none, so decode compares nothing."""
DIGEST_BITS = 63
"""SGLang keeps it in an unsigned 64-bit tensor, into which PyTorch writes signed numbers."""
RUN_BYTES_MIN = 16_384
"""Runs that are shorter on average are copied together before they are digested."""
GATHERED_BYTES_MAX = 65_536
"""Copied at a time: what stays in a core's cache."""
ROW_POOLS = frozenset({"MHATokenToKVPool", "MLATokenToKVPool"})
"""Pools in which a page is the rows of its tokens, one after another. Those of others are digested by the page."""
CHECKED = "tandem_kv_checked"
"""Attribute of a request whose KV was compared, and matched if it still runs."""

_DISAGGREGATION = "sglang.srt.disaggregation"
_COMPUTER = f"{_DISAGGREGATION}.checksum.KvChecksumComputer"


def targets(device: str) -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    on_cpu = device == "cpu"
    hooks: dict[str, tuple[Callable[..., Any], str]] = {
        f"{_COMPUTER}.compute": (_digest_on_cpu if on_cpu else _digest_on_gpu, "replace"),
        f"{_DISAGGREGATION}.checksum.page_indices_for_request": (_rows, "around"),
        f"{_DISAGGREGATION}.utils.kv_layout_signature": (_signature_on_cpu if on_cpu else _signature_on_gpu, "replace"),
        "sglang.srt.managers.scheduler.Scheduler._verify_kv_checksums": (_verify, "around"),
    }
    return hooks if on_cpu else hooks | {f"{_COMPUTER}.__init__": (_compile, "after")}


@dataclass(frozen=True, slots=True)
class Rows:
    """The KV of one hand-over: rows of every buffer of the pool."""

    indices: Any
    """A tensor of the rows, in the order of the tokens."""
    per_item: int
    """Rows in one item (page) of SGLang's buffers."""

    def widths(self, item_bytes: Sequence[int]) -> list[int]:
        """Bytes of a row of each buffer."""
        return [size // self.per_item for size in item_bytes]


def share() -> float:
    """The share of hand-overs to check, of this engine."""
    return float(os.environ.get(KV_CHECK_SHARE, "1"))


def _rows(original: Callable[..., Any], scheduler: Any, request: Any, end_idx: int, start_idx: int = 0) -> Rows | None:
    """The rows of tokens `start_idx` to `end_idx`; None: not in the sample."""
    if not is_sampled(request.bootstrap_room, share()):
        return None
    allocator = scheduler.token_to_kv_pool_allocator
    if type(allocator.get_kvcache()).__name__ not in ROW_POOLS:
        return Rows(original(scheduler, request, end_idx, start_idx=start_idx), 1)
    slots = scheduler.req_to_token_pool.req_to_token[request.kv.req_pool_idx, start_idx:end_idx]
    return Rows(slots, allocator.page_size)


def _signature_on_cpu(kv_args: Any) -> int:
    return signature(kv_args, "cpu")


def _signature_on_gpu(kv_args: Any) -> int:
    return signature(kv_args, "cuda")


def signature(kv_args: Any, device: str) -> int:
    """What two engines must have in common for their digests to be comparable. Positive, never 0 (SGLang's "none")."""
    alike = (
        ALGORITHMS[device],
        kv_args.kv_cache_dtype_str,
        kv_args.kv_layout,
        kv_args.swa_kv_cache_layout,
        [kind.value for kind in kv_args.state_types],
        [size // kv_args.page_size for size in kv_args.kv_item_lens],
        [list(sizes) for sizes in kv_args.state_item_lens],
    )
    raw = hashlib.blake2b(repr(alike).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 1 | 1


def _verify(original: Callable[..., Any], scheduler: Any, batch: Any) -> None:
    """SGLang's comparison, for those of the batch that are in this engine's own sample too."""
    compared, can_digest = [], getattr(scheduler.kv_checksum_computer, "tandem_kernel", True) is not None
    for request in batch.reqs:
        if request.expected_kv_checksum == NO_DIGEST:
            continue
        if can_digest and is_sampled(request.bootstrap_room, share()):
            compared.append(request)
        else:
            request.expected_kv_checksum = NO_DIGEST
    original(scheduler, batch)
    for request in compared:
        setattr(request, CHECKED, True)


# --- On a CPU


def _digest_on_cpu(computer: Any, rows: Rows | None, state_indices: Any = None) -> int:
    """See `digest`. SGLang's own needs a GPU."""
    if rows is None:
        return NO_DIGEST
    groups: list[Group] = [(rows.indices.numpy(), computer._kv_data_ptrs, rows.widths(computer._kv_item_lens))]
    if state_indices is not None:
        groups.append((state_indices.numpy(), computer._state_data_ptrs, computer._state_item_lens))
    return digest(groups)


Group = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Rows, and of each buffer its address and the bytes of a row."""


def digest(groups: Iterable[Group]) -> int:
    """XXH3 over the rows of each buffer. Equal rows in equal order have equal digests, wherever they lie."""
    import numpy
    import xxhash

    hasher = xxhash.xxh3_64()
    for indices, addresses, widths in groups:
        rows = numpy.asarray(indices, dtype=numpy.int64).reshape(-1)
        runs = runs_of(rows)
        for address, width in zip(addresses, widths, strict=True):
            if len(rows) * width < len(runs) * RUN_BYTES_MIN:
                _add_gathered(hasher, address, width, rows)
                continue
            for first, count in runs:
                hasher.update(_memory(address + first * width, count * width))
    return int(hasher.intdigest() >> (64 - DIGEST_BITS)) or 1


def runs_of(rows: Any) -> list[tuple[int, int]]:
    """Consecutive rows as (first row, number of rows): pages that follow each other are read in one go."""
    import numpy

    if not len(rows):
        return []
    starts = numpy.concatenate(([0], numpy.flatnonzero(numpy.diff(rows) != 1) + 1))
    counts = numpy.diff(numpy.concatenate((starts, [len(rows)])))
    return list(zip(rows[starts].tolist(), counts.tolist(), strict=True))


def _add_gathered(hasher: Any, address: int, width: int, rows: Any) -> None:
    """Rows that lie scattered: copied together first, a piece at a time, because each call costs as much as 16 KiB."""
    import numpy

    size = int(rows.max()) + 1
    table: Any = numpy.frombuffer(_memory(address, size * width), dtype=f"V{width}")
    step = max(1, GATHERED_BYTES_MAX // width)
    for begin in range(0, len(rows), step):
        hasher.update(table[rows[begin : begin + step]].view(numpy.uint8))


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


# --- On a GPU


def _compile(result: None, computer: Any, *arguments: Any, **keywords: Any) -> None:
    """Compile SGLang's kernel at start: at the first request it would hold up the scheduler's loop."""
    from sglang.kernels.ops.memory import adler32

    computer.tandem_kernel = None
    try:
        computer.tandem_kernel = adler32._jit_adler32_module()
    except Exception as problem:  # the toolchain raises its own errors
        log.error("SGLang's checksum kernel cannot be compiled, hand-overs of this engine are not checked: %s", problem)


def _digest_on_gpu(computer: Any, rows: Rows | None, state_indices: Any = None) -> int:
    """Adler-32 by SGLang's kernel, one thread a row. SGLang's own call launches several kernels for each buffer."""
    import torch

    if rows is None or computer.tandem_kernel is None:
        return NO_DIGEST
    groups = [(rows.indices, computer._kv_data_ptrs, rows.widths(computer._kv_item_lens))]
    if state_indices is not None:
        groups.append((state_indices, computer._state_data_ptrs, computer._state_item_lens))
    addresses, sizes = [], []
    for indices, pointers, widths in groups:
        table = torch.tensor([pointers, widths], dtype=torch.int64).to(indices.device, non_blocking=True)
        addresses.append((table[0, :, None] + indices.to(torch.int64).reshape(1, -1) * table[1, :, None]).reshape(-1))
        sizes.append(table[1].to(torch.int32).repeat_interleave(indices.numel(), output_size=len(addresses[-1])))
    return _reduce(computer.tandem_kernel, torch.cat(addresses), torch.cat(sizes)) or 1


def _reduce(kernel: Any, addresses: Any, sizes: Any) -> int:
    from sglang.kernels.ops.memory import adler32

    if not len(addresses):
        return 1
    blocks = -(-len(addresses) // adler32._BLOCK_SIZE)
    states = adler32._alloc_states(blocks, addresses.device)
    kernel.adler32_strided(addresses, sizes, states, len(addresses))
    return int(adler32._reduce_states(kernel, states, blocks))
