"""A server that stops ends the calls it carries before its process ends, and says nothing more."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from tandem.client.health_calls import HealthWatch
from tandem.rpc.channels import Channels
from tests.wire.support.server_kinds import on_both_servers

WATCHERS = 5
ROUNDS = 4
SERVER = """
import asyncio, logging, sys
from {module} import {name}

async def serve():
    server = {name}()
    await server.start("127.0.0.1", 0)
    await server.set_serving(True)
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop(0.05)

logging.basicConfig(level=logging.INFO)
asyncio.run(serve())
"""


@on_both_servers
async def test_watchers_of_its_health_leave_nothing_in_the_log_of_a_process_that_ends(server_type: type[Any]) -> None:
    """Their cancellation was the last line of a worker that had said why it ended; in every other stop, or so."""
    for _ in range(ROUNDS):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SERVER.format(module=server_type.__module__, name=server_type.__name__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        address = f"127.0.0.1:{int(await process.stdout.readline())}"
        channels = Channels()
        watches = [HealthWatch(channels.get(address), waits=False) for _ in range(WATCHERS)]
        assert all([await watch.read() for watch in watches])
        _, said = await process.communicate(b"\n")
        await channels.close()
        assert (process.returncode, said.decode()) == (0, "")
