"""Calls between the processes of one frontend, over Unix sockets; failures are raised as TandemError.

Each call opens its own connection: calls are rare, and a kept connection would still be in reconnect backoff after its
peer has been restarted. The frontend chooses the processes and merges their responses.
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
"""A process that does not respond within this time is left out."""


class SiblingCalls:
    """Calls to one sibling process."""

    def __init__(self, path: Path) -> None:
        self._address = f"unix:{path}"

    async def timelines(self, request_id: str) -> list[admin_pb.RequestTimeline]:
        """Its timelines of a request id.

        Raises:
            TandemError: the process did not respond.
        """
        request = pb.GetSiblingTimelinesRequest(request_id=request_id)
        return list((await self._ask("GetSiblingTimelines", request)).timelines)

    async def requests(self, request: pb.ListSiblingRequestsRequest) -> list[pb.ListedRequest]:
        """Its request list.

        Raises:
            TandemError: the process did not respond.
        """
        return list((await self._ask("ListSiblingRequests", request)).requests)

    async def figures(self) -> pb.GetSiblingFiguresResponse:
        """Its statistics.

        Raises:
            TandemError: the process did not respond.
        """
        response: pb.GetSiblingFiguresResponse = await self._ask("GetSiblingFigures", pb.GetSiblingFiguresRequest())
        return response

    async def process(self) -> process_pb.GetFiguresResponse:
        """Its resource use.

        Raises:
            TandemError: the process did not respond.
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
