"""A TCP link that can be cut: it stands between two processes and carries bytes until it is told not to.

Three cuts: SILENT keeps connections and carries nothing, as a cable that was pulled; RESET breaks them and each new
one; CLOSED refuses new ones too, as a host without the process. Owns the link and counts what it kept from passing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum

PIECE_BYTES = 64 * 2**10


class Cut(Enum):
    """What the link does."""

    NONE = "none"
    SILENT = "silent"
    RESET = "reset"
    CLOSED = "closed"


class CutProxy:
    """One link from a port of its own to a target. Use `cut_proxy`, or `start` and `stop`."""

    def __init__(self, target: str, host: str = "127.0.0.1", port: int = 0) -> None:
        """`target` is host:port; it need not be there yet. Port 0: the OS chooses."""
        self.cut = Cut.NONE
        self.held_count = 0
        """Pieces and connections that a cut kept from passing: the proof that it was felt."""
        self._target_host, _, self._target_port = target.rpartition(":")
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None
        self._carriers: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._healed = asyncio.Event()
        self._healed.set()

    @property
    def address(self) -> str:
        """host:port to be connected to."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Carry."""
        self._server = await asyncio.start_server(self._connected, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End everything on the link. May be called twice."""
        await self._close_server()
        carriers = list(self._carriers)
        for carrier in carriers:
            carrier.cancel()
        if carriers:
            await asyncio.wait(carriers)

    async def sever(self, cut: Cut) -> None:
        """Cut the link."""
        assert cut is not Cut.NONE, "heal() ends a cut"
        self.cut, self.held_count = cut, 0
        self._healed.clear()
        if cut is Cut.CLOSED:
            await self._close_server()
        if cut is not Cut.SILENT:
            for writer in list(self._writers):
                _break(writer)

    async def heal(self) -> None:
        """Carry again. What a silent cut held back goes on, as TCP does it."""
        self.cut = Cut.NONE
        self._healed.set()
        if self._server is None:
            await self.start()

    async def _close_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._link(reader, writer), name=f"link-{self._port}")
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)

    async def _link(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        """Both directions of one connection, until either end leaves."""
        self._writers.add(near)
        far: asyncio.StreamWriter | None = None
        try:
            await self._pass_or_hold(near)
            far_reader, far = await asyncio.open_connection(self._target_host, int(self._target_port))
            self._writers.add(far)
            tasks = [
                asyncio.create_task(self._carry(near_reader, far)),
                asyncio.create_task(self._carry(far_reader, near)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        except OSError:
            # The target is not there: whoever came is told the hard way.
            _break(near)
        finally:
            for writer in filter(None, (near, far)):
                self._writers.discard(writer)
                writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._pass_or_hold(writer)
                writer.write(piece)
                await writer.drain()

    async def _pass_or_hold(self, writer: asyncio.StreamWriter) -> None:
        if self.cut is Cut.NONE:
            return
        self.held_count += 1
        if self.cut is not Cut.SILENT:
            _break(writer)
            raise ConnectionResetError("the link is cut")
        await self._healed.wait()


def _break(writer: asyncio.StreamWriter) -> None:
    """End a connection with a reset instead of a close."""
    own = writer.get_extra_info("socket")
    if own is not None:
        with contextlib.suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def cut_proxy(target: str, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[CutProxy]:
    """A link as long as the block."""
    proxy = CutProxy(target, host, port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
