"""Bootstrap and KV transfer between the two legs of an attempt: a server in the prefill engine, a client in decode.

The socket is real unless time is virtual, so that killing, freezing or disconnecting either process has real effects;
the KV itself is a 16-byte state and a byte count. Owns the timeouts; a closed socket ends a wait at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from tandem.domain.generation import Bootstrap
from tandem.domain.network_address import join_address
from tandem.engine.simulated.network import Listener, Network, TcpNetwork, Writer
from tandem.engine.simulated.tokens import SequenceState
from tandem.engine.simulated.wire import ConnectionLost, KvHeader, Line, parse_state
from tandem.errors import LegFailed, StartError

HELLO_TIMEOUT_S = 5.0
HOST_SHOWN_CHARS = 64
T = TypeVar("T")


class DecodePeer:
    """A decode engine that has connected for a room, as seen by the prefill engine."""

    def __init__(self, line: Line, cached_tokens: int = 0) -> None:
        self.line = line
        self.cached_tokens = cached_tokens
        """First tokens of the prompt, in full pages, that decode has in its prefix cache."""
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Bytes that decode confirms; ConnectionLost if it disconnected."""

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """Await `work`, and cancel it if the peer disconnects.

        Raises:
            ConnectionLost: the peer disconnected first.
        """
        task = asyncio.ensure_future(work)
        # Retrieve its exception: when the peer is lost, `work` fails for the same reason and is not awaited.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            await asyncio.wait((task, self.done), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.done.result()
                raise ConnectionLost("it confirmed the KV before all of it was sent")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))


class BootstrapServer:
    """The prefill engine's side: listens, and pairs decode engines with prefill legs by room."""

    def __init__(self, bootstrap_timeout_s: float, transfer_timeout_s: float, network: Network | None = None) -> None:
        self._bootstrap_timeout_s = bootstrap_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._network = network or TcpNetwork()
        self._listener: Listener | None = None
        self._early_decodes: dict[int, DecodePeer] = {}
        self._early_prefills: dict[int, asyncio.Future[DecodePeer]] = {}
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port (0 lets the OS choose one).

        Raises:
            StartError: the address cannot be bound.
        """
        try:
            self._listener = await self._network.listen(self._serve, host, port)
        except OSError as problem:
            raise StartError(f"bootstrap server cannot listen on {join_address(host, port)}: {problem}") from None
        return self._listener.port

    async def stop(self) -> None:
        """Close all connections and stop listening."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        closing = asyncio.ensure_future(listener.close())
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(closing, *connections, return_exceptions=True)

    @asynccontextmanager
    async def meet(self, room: int) -> AsyncIterator[DecodePeer]:
        """Wait for the decode leg of a room; leaving the block closes the connection.

        Raises:
            LegFailed: no decode leg connected in time (phase "bootstrapping"), or the connection was lost inside the
                block ("transferring").
        """
        peer = await self._wait_for_decode(room)
        try:
            await peer.line.send("met")
            yield peer
        except ConnectionLost as lost:
            raise leg_failed("prefill", "transferring", room, f"lost the decode leg: {lost}") from None
        finally:
            peer.line.close()

    async def hand_over(
        self,
        peer: DecodePeer,
        room: int,
        header: KvHeader,
        state: SequenceState,
        parts: AsyncGenerator[int],
        kv_digest: str | None = None,
    ) -> None:
        """Send a prompt's KV, and wait until decode confirms all of it.

        Args:
            peer: the decode engine.
            room: the bootstrap room.
            header: total size.
            state: hash state that stands for the KV.
            parts: transfers the KV; yields the bytes of each part that has been transferred.
            kv_digest: of the KV; None: decode is not to check it.

        Raises:
            ConnectionLost: the peer disconnected.
            LegFailed: the peer did not confirm in time, or confirmed another number of bytes.
        """
        await peer.line.send("begin", prompt_tokens=header.prompt_tokens, size_bytes=header.size_bytes)
        async with aclosing(parts):
            async for size_bytes in parts:
                await peer.line.send("part", size_bytes=size_bytes)
        checked = {} if kv_digest is None else {"kv_digest": kv_digest}
        await peer.line.send("end", state=state.hex(), **checked)
        try:
            async with asyncio.timeout(self._transfer_timeout_s):
                received_bytes = await peer.done
        except TimeoutError:
            problem = f"the decode leg did not confirm its KV within {self._transfer_timeout_s:g} s"
            raise leg_failed("prefill", "transferring", room, problem) from None
        if received_bytes != header.size_bytes:
            problem = f"the decode leg received {received_bytes} of {header.size_bytes} KV bytes"
            raise leg_failed("prefill", "transferring", room, problem)

    async def _wait_for_decode(self, room: int) -> DecodePeer:
        if room in self._early_decodes:
            return self._early_decodes.pop(room)
        if room in self._early_prefills:
            raise leg_failed("prefill", "bootstrapping", room, "another prefill leg is waiting in this room")
        arrival: asyncio.Future[DecodePeer] = asyncio.get_running_loop().create_future()
        self._early_prefills[room] = arrival
        try:
            async with asyncio.timeout(self._bootstrap_timeout_s):
                return await arrival
        except BaseException as problem:
            # Connected and timed out in the same iteration of the event loop: this is the only reference to the peer.
            if arrival.done() and not arrival.cancelled():
                arrival.result().line.close()
            if isinstance(problem, TimeoutError):
                waited = f"no decode leg connected within {self._bootstrap_timeout_s:g} s"
                raise leg_failed("prefill", "bootstrapping", room, waited) from None
            raise
        finally:
            del self._early_prefills[room]

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve_line(Line(reader, writer))
        except (ConnectionLost, TimeoutError, asyncio.CancelledError):
            # Reported through `peer.done`; if it propagated, asyncio would log it as a crash of the server.
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve_line(self, line: Line) -> None:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await line.receive("hello", room=int)
        room: int = hello["room"]
        peer = DecodePeer(line, int(hello.get("cached_tokens", 0)))
        waiting = self._early_prefills.get(room)
        if waiting is not None and not waiting.done():
            waiting.set_result(peer)
        elif room in self._early_decodes:
            return  # the first peer keeps the room
        else:
            self._early_decodes[room] = peer
        try:
            done = await line.receive("done", size_bytes=int)
            _settle(peer.done, lambda: peer.done.set_result(done["size_bytes"]))
        except ConnectionLost as lost:
            reason = str(lost)
            _settle(peer.done, lambda: peer.done.set_exception(ConnectionLost(reason)))
        except asyncio.CancelledError:
            _settle(peer.done, lambda: peer.done.set_exception(ConnectionLost("this engine is stopping")))
            raise
        finally:
            if self._early_decodes.get(room) is peer:
                del self._early_decodes[room]


def _settle(future: asyncio.Future[int], how: Callable[[], None]) -> None:
    if not future.done():
        how()
    if not future.cancelled():
        future.exception()  # retrieved, so that asyncio does not log it as never retrieved


@dataclass(frozen=True, slots=True)
class ReceivedKv:
    """The KV that a decode engine received."""

    state: SequenceState
    size_bytes: int
    begin_time_s: float
    end_time_s: float
    kv_digest: str | None = None
    """What prefill says that the KV's digest is; None: it has computed none, or does not know of any."""


async def _nothing(point: str) -> None:
    pass


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


class KvPuller:
    """The decode engine's side: connects to prefill and receives the KV."""

    def __init__(
        self,
        bootstrap_timeout_s: float,
        transfer_timeout_s: float,
        time_s: Callable[[], float],
        network: Network | None = None,
    ) -> None:
        self._bootstrap_timeout_s = bootstrap_timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._time_s = time_s
        self._network = network or TcpNetwork()

    async def pull(
        self,
        bootstrap: Bootstrap,
        prompt_tokens: int,
        cached_tokens: int = 0,
        reach: Callable[[str], Awaitable[object]] = _nothing,
    ) -> ReceivedKv:
        """Connect to the prefill leg and receive its KV.

        Args:
            bootstrap: address and room.
            prompt_tokens: number of tokens of the prompt.
            cached_tokens: number of its first tokens whose KV is here already: full pages, which are not sent.
            reach: called at the named fault points of the transfer.

        Raises:
            LegFailed: phase "bootstrapping" or "transferring".
        """
        line = await self._connect(bootstrap)
        phase = "bootstrapping"
        try:
            async with asyncio.timeout(self._bootstrap_timeout_s):
                await line.send("hello", room=bootstrap.room, cached_tokens=cached_tokens)
                await line.receive("met")
            phase = "transferring"
            async with asyncio.timeout(self._transfer_timeout_s):
                return await self._receive(line, prompt_tokens, reach)
        except TimeoutError:
            limit_s = self._bootstrap_timeout_s if phase == "bootstrapping" else self._transfer_timeout_s
            problem = f"the prefill leg did not respond within {limit_s:g} s"
            raise leg_failed("decode", phase, bootstrap.room, problem) from None
        except ConnectionLost as lost:
            raise leg_failed("decode", phase, bootstrap.room, f"lost the prefill leg: {lost}") from None
        finally:
            line.close()

    async def _receive(self, line: Line, prompt_tokens: int, reach: Callable[[str], Awaitable[object]]) -> ReceivedKv:
        begin = await line.receive("begin", prompt_tokens=int, size_bytes=int)
        begin_time_s = self._time_s()
        if begin["prompt_tokens"] != prompt_tokens:
            raise ConnectionLost(f"it sent KV of {begin['prompt_tokens']} tokens, expected {prompt_tokens}")
        await reach("transfer_begin")
        size_bytes, half_bytes = 0, -(-begin["size_bytes"] // 2)
        while size_bytes < begin["size_bytes"]:
            part_bytes = (await line.receive("part", size_bytes=int))["size_bytes"]
            if part_bytes <= 0:
                raise ConnectionLost(f"it sent a part of {part_bytes} bytes")
            if size_bytes < half_bytes <= size_bytes + part_bytes:
                await reach("transfer_middle")
            size_bytes += part_bytes
        end = await line.receive("end", state=str)
        await reach("transfer_end")
        received = ReceivedKv(
            parse_state(end["state"]), size_bytes, begin_time_s, self._time_s(), _text(end.get("kv_digest"))
        )
        await line.send("done", size_bytes=received.size_bytes)
        return received

    async def _connect(self, bootstrap: Bootstrap) -> Line:
        try:
            async with asyncio.timeout(self._bootstrap_timeout_s):
                reader, writer = await self._network.connect(bootstrap.host, bootstrap.port)
        except (OSError, ValueError, OverflowError) as problem:
            # ValueError: an invalid host name (an empty label, a NUL, too long). OverflowError: a port beyond 65535.
            where = f"{bootstrap.host[:HOST_SHOWN_CHARS]}:{bootstrap.port}"
            problem_text = f"cannot connect to the prefill engine at {where}: {str(problem) or 'timed out'}"
            raise leg_failed("decode", "bootstrapping", bootstrap.room, problem_text) from None
        return Line(reader, writer)


def leg_failed(leg: str, phase: str, room: int, problem: str) -> LegFailed:
    """The error of a bootstrap or KV transfer that failed."""
    return LegFailed(f"{leg} leg failed in {phase} of room {room}: {problem}", leg=leg, phase=phase, room=room)
