"""A TCP link that can be cut or slowed: it stands between two processes and carries bytes until a test stops it.

What it does meanwhile is a `Cut`. Owns the link, and counts what met the cut: a fault that nothing has met proves
nothing.
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
LATE_S = 0.1
TRICKLE_BYTES, TRICKLE_EVERY_S = 24, 0.02


class Cut(Enum):
    """What the link does."""

    NONE = "none"
    SILENT = "silent"
    """Connections stay and carry nothing, as over a cable that was pulled."""
    RESET = "reset"
    """Connections break, and each new one too."""
    CLOSED = "closed"
    """And new ones are refused, as by a host without the process."""
    HALF = "half-closed"
    """Both ends see that nothing more comes (FIN), and what they send goes nowhere; no reset shows them that."""
    LATE = "late"
    """Each piece waits for `LATE_S` in each direction."""
    TRICKLE = "trickle"
    """`TRICKLE_BYTES` go on each `TRICKLE_EVERY_S`."""


SLOWED = frozenset({Cut.LATE, Cut.TRICKLE})
"""Everything arrives."""


class CutProxy:
    """One link from a port of its own to a target. Use `cut_proxy`, or `start` and `stop`."""

    def __init__(self, target: str, host: str = "127.0.0.1", port: int = 0) -> None:
        """`target` is host:port; it need not be there yet. Port 0: the OS chooses."""
        self.cut = Cut.NONE
        self.held_count = 0
        """Pieces and connections that met a cut: the proof that it was felt."""
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
        """Cut or slow the link."""
        assert cut is not Cut.NONE, "heal() ends a cut"
        self.cut, self.held_count = cut, 0
        self._healed.clear()
        if cut is Cut.CLOSED:
            await self._close_server()
        for writer in list(self._writers):
            self._meet(writer)

    async def heal(self) -> None:
        """Carry again. What a silent cut held back goes on, as TCP does it; what was half-closed is closed."""
        was, self.cut = self.cut, Cut.NONE
        if was is Cut.HALF:
            for writer in list(self._writers):
                writer.close()
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
            await self._admit(near_reader, near)
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
            # The target is not there, or the cut is of that kind: the caller gets a reset.
            _break(near)
        finally:
            for writer in filter(None, (near, far)):
                self._writers.discard(writer)
                writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Let a new connection through, as far as the cut allows."""
        if self.cut is Cut.NONE or self.cut in SLOWED:
            return
        self._meet(writer)
        if self.cut is not Cut.HALF:
            self._refuse_broken()
            await self._healed.wait()
            return
        while await reader.read(PIECE_BYTES):
            self.held_count += 1
        raise ConnectionResetError("it left a half-closed connection")

    def _meet(self, writer: asyncio.StreamWriter) -> None:
        """What a connection feels when it meets the cut."""
        if self.cut in SLOWED:
            return
        self.held_count += 1
        if self.cut in (Cut.RESET, Cut.CLOSED):
            _break(writer)
        if self.cut is Cut.HALF:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    def _refuse_broken(self) -> None:
        if self.cut in (Cut.RESET, Cut.CLOSED):
            raise ConnectionResetError("the link is cut")

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._pass(piece, writer)
            if self.cut in (Cut.SILENT, Cut.HALF):
                # Nor does the end of a connection.
                self.held_count += 1
                await self._healed.wait()

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        """Carry a piece in the way of the present cut, which may change meanwhile."""
        while self.cut is not Cut.NONE:
            self.held_count += 1
            self._refuse_broken()
            if self.cut is Cut.HALF:
                return
            if self.cut is Cut.SILENT:
                await self._healed.wait()
            elif self.cut is Cut.LATE:
                await asyncio.sleep(LATE_S)
                break
            else:
                writer.write(piece[:TRICKLE_BYTES])
                piece = piece[TRICKLE_BYTES:]
                if not piece:
                    break
                await asyncio.sleep(TRICKLE_EVERY_S)
        # A cut that came while it waited: what is half-closed takes nothing more.
        if self.cut is not Cut.HALF:  # type: ignore[comparison-overlap] # it changes during an await
            writer.write(piece)
            await writer.drain()


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
