"""The pipe between the benchmark and its children: one JSON object per line, request and response.

Owns the child's end; `children.py` owns the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

LINE_BYTES_MAX = 2**26

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def read_lines() -> asyncio.StreamReader:
    """Standard input, as lines."""
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def say(answer: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def serve(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Answer questions until the parent closes the pipe."""
    while line := await reader.readline():
        say(await answer(json.loads(line)))


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a child: with uvloop where it is installed, and as many sockets as it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            import uvloop
        except ImportError:
            asyncio.run(main())
        else:
            uvloop.run(main())
