"""The files of the worker's model that frontends read: which they are, and their parts in the order of sending.

Owns the reading, in threads: a tokenizer has up to tens of megabytes, and no stream of tokens may wait for a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from tandem.domain.checkpoint import FRONTEND_FILES

PART_BYTES = 2**20


async def parts(model: Path) -> AsyncIterator[tuple[str, bytes]]:
    """Name and next bytes of each file that the directory has; an empty file is one part without bytes."""
    for name in FRONTEND_FILES:
        file = model / name
        if not await asyncio.to_thread(file.is_file):
            continue
        data = await asyncio.to_thread(file.read_bytes)
        for begin in range(0, max(1, len(data)), PART_BYTES):
            yield name, data[begin : begin + PART_BYTES]
