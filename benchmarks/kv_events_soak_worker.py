"""A worker of `benchmarks.kv_events_soak`: its engine's KV events are lost at random, and it answers what is cached.

The worker is Tandem's own. Around the follower of its engine's events it loses messages before they are read, some of
them also for SGLang's replay, and serves a Unix socket that asks the engine itself for the blocks in its cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import runpy
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from tandem.engine.sglang.kv_follower import KvFollower
from tandem.errors import EngineFailed

DIRECTORY, LOSS = "TANDEM_SOAK_DIRECTORY", "TANDEM_SOAK_LOSS"
READS = 3
"""Tries of a read: its answer may be lost like any other message."""


class LossyFollower(KvFollower):
    """Loses messages."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._loss = float(os.environ[LOSS])
        self._draw = random.Random()
        self._has_replay = True
        self.messages = 0
        self.lost = 0

    async def run(self) -> None:
        """See `KvFollower`."""
        path = Path(os.environ[DIRECTORY]) / f"{os.getpid()}.sock"
        async with await asyncio.start_unix_server(self._answer_read, path):
            await super().run()

    async def _take(self, sequence: int, payload: bytes) -> None:
        self.messages += 1
        if self._draw.random() < self._loss:
            self.lost += 1
            # Half of what is lost is lost for the replay too, so that only the engine's cache itself can repair it.
            self._has_replay = self._draw.random() < 0.5
            return
        await super()._take(sequence, payload)

    async def _replay(self) -> AsyncGenerator[tuple[int, bytes]]:
        if self._has_replay:
            async with contextlib.aclosing(super()._replay()) as messages:
                async for message in messages:
                    yield message
        elif await self._has_missed():
            # As where SGLang keeps none: it answers with the oldest that it has, which is a later one.
            self._has_replay = True
            yield sys.maxsize, b""

    async def _has_missed(self) -> bool:
        async with contextlib.aclosing(super()._replay()) as messages:
            return await anext(messages, None) is not None

    async def _answer_read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hashes: list[int] | None = None
        for _ in range(READS):
            with contextlib.suppress(EngineFailed):
                hashes = [*(await self.read()).block_hashes]
                break
        writer.write(json.dumps({"hashes": hashes, "messages": self.messages, "lost": self.lost}).encode())
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()


if __name__ == "__main__":
    import tandem.engine.sglang.engine as sglang_engine

    vars(sglang_engine)["KvFollower"] = LossyFollower
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
