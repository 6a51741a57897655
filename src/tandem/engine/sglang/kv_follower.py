"""Follows SGLang's KV events into a mirror: notices what is missing, and repairs it.

SGLang publishes on a socket that drops what is not read in time. Its messages are numbered, so a gap shows with the
next message, and the loss of the last ones with the next look at SGLang's replay socket, which is taken once a second
while all is quiet. Repair: the replay socket sends the missing messages again; where it no longer has them, the
engine's scheduler publishes the whole contents of its cache, in order with the other messages.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from tandem.engine.kv_mirror import KvCacheMirror
from tandem.engine.port import KvSnapshot
from tandem.engine.sglang import kv_events
from tandem.engine.sglang.kv_events import EventReader, Refused
from tandem.errors import EngineFailed

log = logging.getLogger(__name__)

QUIET_S = 1.0
"""Time without a message after which the replay socket is asked for missed ones."""
ANSWER_TIMEOUT_S = 5.0
UNREAD_MESSAGES_MAX = 10_000
"""Of a worker whose event loop is blocked. Beyond them messages are lost, which is repaired; memory is not."""
SEQUENCE_BYTES = 8
END = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
"""Sequence in the last message of a replay."""
AskDump = Callable[[int], Awaitable[None]]


class KvFollower:
    """Of one engine. `run` is its task; it ends when the engine's events are refused."""

    def __init__(self, directory: Path, mirror: KvCacheMirror, ask_dump: AskDump, quiet_s: float = QUIET_S) -> None:
        """`ask_dump` has the scheduler publish its cache under a number. `directory` has SGLang's sockets."""
        self._endpoint, self._replay_endpoint = kv_events.endpoints(directory)
        self._mirror = mirror
        self._reader = EventReader(mirror)
        self._ask_dump = ask_dump
        self._quiet_ms = int(quiet_s * 1_000)
        self._next = 0
        """Sequence of the next message."""
        self._numbers = itertools.count(1)
        self._repair: int | None = None
        """Number of the dump that ends the present gap; None without one."""
        self._asked_s = 0.0
        """When that dump was asked for."""
        self._clock = asyncio.get_running_loop().time
        self._dumps: dict[int, asyncio.Future[KvSnapshot]] = {}

    async def run(self) -> None:
        """Follow the events without end; returns when they are refused."""
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        try:
            socket.set_hwm(UNREAD_MESSAGES_MAX)
            socket.connect(self._endpoint)
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            await self._follow(socket)
        except Refused as refused:
            self._mirror.refuse(str(refused))
        except Exception:  # without a follower the mirror would be wrong from now on, and must not be believed
            log.exception("following the engine's KV events failed")
            self._mirror.refuse("following them failed; see the log lines above")
        finally:
            socket.close(linger=0)
            for waiting in self._dumps.values():
                waiting.cancel()

    async def read(self) -> KvSnapshot:
        """What the engine says it has cached, in order with its events.

        Raises:
            EngineFailed: it did not answer in time, or its events are refused.
        """
        number, dumped = next(self._numbers), asyncio.get_running_loop().create_future()
        self._dumps[number] = dumped
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._ask_dump(number)
                return await asyncio.shield(dumped)
        except (TimeoutError, asyncio.CancelledError) as problem:
            if isinstance(problem, TimeoutError) or dumped.cancelled():
                raise EngineFailed("the engine did not report the contents of its prefix cache") from None
            raise
        finally:
            del self._dumps[number]

    async def _follow(self, socket: Any) -> None:
        # Messages from before the subscription.
        await self._catch_up()
        while True:
            has_message = await socket.poll(self._quiet_ms)
            if has_message:
                _, sequence, payload = await socket.recv_multipart()
                await self._take(int.from_bytes(sequence, "big"), payload)
            if self._repair is not None:
                # A dump can be lost too.
                if not has_message or self._clock() > self._asked_s + ANSWER_TIMEOUT_S:
                    await self._ask_repair()
            elif not has_message and not await self._catch_up():
                self._mirror.lost()
                await self._ask_repair()

    async def _take(self, sequence: int, payload: bytes) -> None:
        if sequence > self._next and self._repair is None:
            await self._close_gap(sequence)
        # Those before have come from a replay already.
        if sequence >= self._next:
            self._apply(sequence, payload)

    async def _close_gap(self, sequence: int) -> None:
        """Messages before this one are missing: get them from the replay, or else have the cache dumped."""
        log.warning("lost the KV events %d to %d of the engine; repairing", self._next, sequence - 1)
        self._mirror.lost()
        if await self._catch_up() and self._next >= sequence:
            self._mirror.repaired()
        else:
            await self._ask_repair()

    async def _catch_up(self) -> bool:
        """Apply the messages that the replay socket has from the next one on; returns whether it had all of them."""
        async with aclosing(self._replay()) as messages:
            async for sequence, payload in messages:
                if sequence > self._next:
                    return False
                self._apply(sequence, payload)
        return True

    async def _ask_repair(self) -> None:
        self._repair, self._asked_s = next(self._numbers), self._clock()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._ask_dump(self._repair)
        except (TimeoutError, EngineFailed):
            # A stopped or dying engine: asked again after the next quiet time.
            log.warning("the engine does not report the contents of its prefix cache, which stay unknown")

    def _apply(self, sequence: int, payload: bytes) -> None:
        """Apply one message; in a gap, only the dump that ends it counts."""
        for dump in self._reader.apply(payload):
            if dump["number"] == self._repair:
                self._mirror.replace(array("q", dump["block_hashes"]))
                self._repair = None
            self._answer(dump)
        self._next = sequence + 1

    def _answer(self, dump: Mapping[str, Any]) -> None:
        waiting = self._dumps.get(dump["number"])
        if waiting is not None and not waiting.done():
            hashes = array("q", dump["block_hashes"])
            waiting.set_result(KvSnapshot(sequence=self._mirror.sequence, block_hashes=hashes))

    async def _replay(self) -> AsyncGenerator[tuple[int, bytes]]:
        """The messages that SGLang still has, from the next one on; ends early where it does not answer."""
        # A socket for each replay: a late answer to an earlier one cannot be taken for this one's.
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        try:
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", self._next.to_bytes(SEQUENCE_BYTES, "big")])
            while await socket.poll(int(ANSWER_TIMEOUT_S * 1_000)):
                *_, sequence, payload = await socket.recv_multipart()
                if sequence == END:
                    return
                yield int.from_bytes(sequence, "big"), payload
        finally:
            socket.close(linger=0)
