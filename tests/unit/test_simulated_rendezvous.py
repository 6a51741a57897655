"""The bootstrap server against misbehaving peers: silent, malformed, early, duplicated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import pytest_asyncio

from tandem.domain.generation import Bootstrap
from tandem.engine.simulated import rendezvous
from tandem.engine.simulated.rendezvous import BootstrapServer, KvPuller
from tandem.engine.simulated.tokens import digest
from tandem.engine.simulated.wire import KvHeader
from tandem.errors import LegFailed
from tandem.testing.eventually import assert_eventually

HEADER = KvHeader(4, 64)


class Served(BootstrapServer):
    """A server that knows its port."""

    port = 0


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Served]:
    server = Served(bootstrap_timeout_s=1.0, transfer_timeout_s=0.3)
    server.port = await server.start("127.0.0.1", 0)
    yield server
    await server.stop()
    assert not server._early_decodes
    assert not server._early_prefills
    assert not server._connections


def puller(timeout_s: float = 1.0) -> KvPuller:
    return KvPuller(timeout_s, timeout_s, lambda: 0.0)


def at(server: Served, room: int = 7) -> Bootstrap:
    return Bootstrap(host="127.0.0.1", port=server.port, room=room)


async def parts(*sizes_bytes: int) -> AsyncGenerator[int]:
    for size_bytes in sizes_bytes or (HEADER.size_bytes,):
        yield size_bytes


async def hand_over(server: Served, room: int = 7) -> None:
    async with server.meet(room) as peer:
        await server.hand_over(peer, room, HEADER, digest([1]), parts())


async def test_hand_over(server: Served) -> None:
    received, _ = await asyncio.gather(puller().pull(at(server), 4), hand_over(server))
    assert (received.state, received.size_bytes) == (digest([1]), 64)


async def test_rooms_do_not_mix(server: Served) -> None:
    rooms = range(2**62, 2**62 + 8)

    async def send(room: int) -> None:
        async with server.meet(room) as peer:
            await server.hand_over(peer, room, HEADER, digest([room]), parts())

    received, _ = await asyncio.gather(
        asyncio.gather(*(puller().pull(at(server, room), 4) for room in rooms)),
        asyncio.gather(*(send(room) for room in reversed(rooms))),
    )
    assert [r.state for r in received] == [digest([room]) for room in rooms]


async def test_a_second_decode_in_a_room_is_sent_away(server: Served) -> None:
    first = asyncio.create_task(puller().pull(at(server), 4))
    await assert_eventually(lambda: len(server._early_decodes))
    with pytest.raises(LegFailed, match="bootstrap"):
        await puller().pull(at(server), 4)
    await hand_over(server)
    assert (await first).size_bytes == 64


async def test_a_second_prefill_in_a_room_is_refused(server: Served) -> None:
    first = asyncio.create_task(hand_over(server))
    await assert_eventually(lambda: len(server._early_prefills))
    with pytest.raises(LegFailed, match="another prefill leg"):
        await hand_over(server)
    await puller().pull(at(server), 4)
    await first


async def test_a_decode_that_never_confirms(server: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b'{"kind": "hello", "room": 7}\n')
    with pytest.raises(LegFailed, match="did not confirm"):
        await hand_over(server)
    writer.close()


async def test_a_decode_that_confirms_too_little(server: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b'{"kind": "hello", "room": 7}\n')
    leg = asyncio.create_task(hand_over(server))
    assert b"end" in await reader.readuntil(b"state")
    writer.write(b'{"kind": "done", "size_bytes": 63}\n')
    with pytest.raises(LegFailed, match="63 of 64"):
        await leg
    writer.close()


@pytest.mark.parametrize(
    "rude",
    [
        b"GET / HTTP/1.1\r\n",
        b'{"kind": "hello"}\n',
        b'{"kind": "hello", "room": "7"}\n',
        b"[1]\n",
        b"\xff\n",
        b"x" * 9000,
    ],
)
async def test_strangers_are_hung_up_on(server: Served, rude: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(rude)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
    await asyncio.gather(puller().pull(at(server), 4), hand_over(server))


async def test_a_silent_stranger_is_hung_up_on(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HELLO_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()


async def test_a_decode_that_leaves_early_is_forgotten(server: Served) -> None:
    leg = asyncio.create_task(puller().pull(at(server), 4))
    await assert_eventually(lambda: len(server._early_decodes))
    leg.cancel()
    await assert_eventually(lambda: not server._early_decodes, what="room forgotten")
