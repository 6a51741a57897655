"""A DNS server over TCP on a loopback port, with the zone a test writes. Answers nothing over UDP."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class DnsServer:
    """Records are text as in a zone file: (name, type, data)."""

    def __init__(self, *records: tuple[str, str, str], along: tuple[tuple[str, str, str], ...] = ()) -> None:
        self.records = list(records)
        self.along = along
        """Sent in the additional section of every answer."""
        self.is_silent = False
        self.port = 0
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                wire = self.answer(await reader.readexactly(length))
                if self.is_silent:
                    await asyncio.sleep(3600)
                writer.write(struct.pack("!H", len(wire)) + wire)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, wire: bytes) -> bytes:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked.append(f"{question.name} {dns.rdatatype.to_text(question.rdtype)}")
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA
        named = [record for record in self.records if record[0] == str(question.name)]
        for name, kind, data in named:
            if dns.rdatatype.from_text(kind) == question.rdtype:
                response.answer.append(dns.rrset.from_text(name, 0, "IN", kind, data))
        response.additional.extend(dns.rrset.from_text(name, 0, "IN", kind, data) for name, kind, data in self.along)
        if not named:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()


@asynccontextmanager
async def serving(server: DnsServer) -> AsyncIterator[DnsServer]:
    tasks: set[asyncio.Task[None]] = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(server.serve(reader, writer)))

    listener = await asyncio.start_server(begin, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
