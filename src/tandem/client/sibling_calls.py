"""The calls by which the processes of one frontend ask each other, over Unix sockets; failures come as TandemError.

Each call has a connection of its own: they are rare, and one that is kept would wait for its next try to connect when
the process at its other end has been started again. Which process is asked, and what is made of the answers, is the
frontend's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from tandem.api.admin.v1 import admin_service_pb2 as admin_pb
from tandem.api.frontend.v1 import sibling_service_pb2 as pb
from tandem.api.frontend.v1.sibling_service_pb2_grpc import SiblingServiceStub
from tandem.api.process.v1 import process_service_pb2 as process_pb
from tandem.rpc.channels import open_channel
from tandem.rpc.status import from_rpc_error

TIMEOUT_S = 1.0
"""A process that does not answer in it is left out."""


class SiblingCalls:
    """To one of the others."""

    def __init__(self, path: Path) -> None:
        self._address = f"unix:{path}"

    async def timelines(self, request_id: str) -> list[admin_pb.RequestTimeline]:
        """The timelines it has for an id.

        Raises:
            TandemError: it does not answer.
        """
        request = pb.GetSiblingTimelinesRequest(request_id=request_id)
        return list((await self._ask("GetSiblingTimelines", request)).timelines)

    async def requests(self, request: pb.ListSiblingRequestsRequest) -> list[pb.ListedRequest]:
        """The requests it knows.

        Raises:
            TandemError: it does not answer.
        """
        return list((await self._ask("ListSiblingRequests", request)).requests)

    async def figures(self) -> pb.GetSiblingFiguresResponse:
        """Its figures.

        Raises:
            TandemError: it does not answer.
        """
        response: pb.GetSiblingFiguresResponse = await self._ask("GetSiblingFigures", pb.GetSiblingFiguresRequest())
        return response

    async def process(self) -> process_pb.GetFiguresResponse:
        """What it holds.

        Raises:
            TandemError: it does not answer.
        """
        response: pb.GetSiblingProcessResponse = await self._ask("GetSiblingProcess", pb.GetSiblingProcessRequest())
        return response.process

    async def _ask(self, method: str, request: Any) -> Any:
        async with open_channel(self._address) as channel:
            stub: Any = SiblingServiceStub(channel)
            try:
                return await getattr(stub, method)(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as failure:
                raise from_rpc_error(failure) from None
