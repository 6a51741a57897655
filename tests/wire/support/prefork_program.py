"""The child of a parent of tests: a server whose ProcessService says which process answers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from tandem.errors import ConfigError, StartError
from tandem.rpc.http2.server import Http2RpcServer
from tandem.service.parent_death import is_orphan
from tandem.service.prefork.child import ParentLink, find_parent
from tandem.service.prefork.process import State
from tandem.service.startup import begin

REFUSALS = {"setting": ConfigError("port", "is odd"), "start": StartError("there is no model")}


async def serve(link: ParentLink, first: dict[str, Any]) -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    server = Http2RpcServer()
    await server.serve()
    link.open(server)
    await server.set_serving(True)
    link.enter(State.SERVING)
    if first.get("asks"):
        server.process.others = lambda: answers(link)
    await asyncio.wait(
        {asyncio.ensure_future(link.wait_asked()), asyncio.ensure_future(asked.wait())},
        return_when=asyncio.FIRST_COMPLETED,
    )
    await link.agree_on_drain()
    link.enter(State.DRAINING)
    link.report_drained(is_clean=not first.get("is_unclean"))
    await link.wait_stop()
    await server.stop(0)


async def answers(link: ParentLink) -> Any:
    """The parent's answer, as if it were the counts of another process."""
    from tandem.api.process.v1 import process_service_pb2 as pb

    answer = await link.ask(what="pid")
    return [] if answer is None else [pb.GetFiguresResponse(release=answer["said"], pid=os.getppid())]


def main() -> int:
    begin()
    link = find_parent(os.environ)
    assert link is not None
    first = link.wait_begin()
    if first.get("refusal"):
        problem = REFUSALS[first["refusal"]]
        link.fail(problem)
        return problem.exit_status
    if first.get("dies"):
        return 3
    asyncio.run(serve(link, first))
    return 1 if is_orphan(os.environ) else 0


if __name__ == "__main__":
    sys.exit(main())
