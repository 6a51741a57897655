"""One process as a member of its frontend: gets connections from the parent, and exchanges calls with its siblings.

Owns the server for siblings, its SiblingService, and the calls to them. `app` serves the clients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from google.protobuf.json_format import ParseDict

from tandem.api.frontend.v1 import sibling_service_pb2 as pb
from tandem.api.frontend.v1 import sibling_service_pb2_grpc as pb_grpc
from tandem.api.frontend.v1.quota_service_pb2_grpc import add_QuotaServiceServicer_to_server
from tandem.api.process.v1 import process_service_pb2 as process_pb
from tandem.errors import StartError
from tandem.rpc.http2.server import Http2RpcServer
from tandem.rpc.process_servicer import ProcessServicer
from tandem.service.prefork.child import ParentLink
from tandem_frontend.admin.local_requests import LocalRequests
from tandem_frontend.admission.quota_exchange import SERVICE_NAME as QUOTA_SERVICE_NAME
from tandem_frontend.admission.quota_exchange import QuotaExchange, QuotaServicer
from tandem_frontend.processes.identity import ProcessIdentity
from tandem_frontend.processes.siblings import Siblings

STOP_GRACE_S = 0.1
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["SiblingService"].full_name


class SiblingServicer(pb_grpc.SiblingServiceServicer):
    """The contract of sibling_service.proto."""

    def __init__(self, own: LocalRequests, process: ProcessServicer) -> None:
        """`process`: of the server that clients call, not of the one for siblings."""
        self._own = own
        self._process = process

    async def GetSiblingTimelines(  # noqa: N802
        self, request: pb.GetSiblingTimelinesRequest, context: Any
    ) -> pb.GetSiblingTimelinesResponse:
        """The timelines of all requests that an id matches."""
        return pb.GetSiblingTimelinesResponse(timelines=self._own.timelines(request.request_id))

    async def ListSiblingRequests(  # noqa: N802
        self, request: pb.ListSiblingRequestsRequest, context: Any
    ) -> pb.ListSiblingRequestsResponse:
        """Requests, newest first."""
        before = (request.before.begin_s, request.before.request_id) if request.HasField("before") else None
        found = self._own.requests(request.count, before, open_only=request.open_only)
        return pb.ListSiblingRequestsResponse(requests=found)

    async def GetSiblingFigures(  # noqa: N802
        self, request: pb.GetSiblingFiguresRequest, context: Any
    ) -> pb.GetSiblingFiguresResponse:
        """The current stats."""
        return self._own.figures()

    async def GetSiblingProcess(  # noqa: N802
        self, request: pb.GetSiblingProcessRequest, context: Any
    ) -> pb.GetSiblingProcessResponse:
        """The resources held now."""
        return pb.GetSiblingProcessResponse(process=self._process.own())


class Membership:
    """Membership of this process in a frontend of several."""

    def __init__(self, identity: ProcessIdentity, link: ParentLink) -> None:
        """Makes no I/O yet."""
        self.identity = identity
        self.siblings = Siblings(identity.sibling_paths)
        self._link = link
        self._server = Http2RpcServer()

    async def open(self, server: Http2RpcServer, own: LocalRequests, exchange: QuotaExchange) -> None:
        """Serve siblings, and accept connections of clients from the parent for `server`.

        Raises:
            StartError: cannot listen on the socket for siblings.
        """
        servicer = SiblingServicer(own, server.process)
        self._server.add(SERVICE_NAME, partial(pb_grpc.add_SiblingServiceServicer_to_server, servicer))
        quotas = QuotaServicer(exchange, own_only=True)
        self._server.add(QUOTA_SERVICE_NAME, partial(add_QuotaServiceServicer_to_server, quotas))
        try:
            self._server.bind_local(self.identity.rpc_path)
        except OSError as problem:
            raise StartError(f"cannot listen at {self.identity.rpc_path}: {problem.strerror or problem}") from None
        await self._server.serve()
        server.process.others = self._held_elsewhere
        self._link.open(server)

    async def close(self) -> None:
        """Stop serving siblings. May be called twice."""
        await self._server.stop(STOP_GRACE_S)
        with contextlib.suppress(OSError):
            self.identity.rpc_path.unlink(missing_ok=True)
            self.identity.metrics_path.unlink(missing_ok=True)

    async def _held_elsewhere(self) -> Sequence[process_pb.GetFiguresResponse]:
        """The resources held by the parent, which is first because it represents the frontend, and by the siblings."""
        answer = await self._link.ask()
        parent = [] if answer is None else [ParseDict(answer["process"], process_pb.GetFiguresResponse())]
        return [*parent, *await self.siblings.ask(lambda sibling: sibling.process())]
