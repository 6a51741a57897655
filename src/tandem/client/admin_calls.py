"""Calls of operators: timelines and statistics of frontends, and profiles. Failures are raised as TandemError.

Owns the calls only. `tls`: client certificate, for a cluster with TLS; None: plaintext.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import grpc

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1.admin_service_pb2_grpc import FrontendAdminServiceStub, ProfileServiceStub
from tandem.client.call_errors import call_error
from tandem.errors import ProfileFailed, RequestNotFound
from tandem.rpc.channels import open_channel
from tandem.tls.paths import Tls

CALL_TIMEOUT_S = 5.0
TIMELINES_AT_A_TIME = 8


async def request_timelines(address: str, request_id: str, *, tls: Tls | None = None) -> list[pb.RequestTimeline]:
    """Timelines of a request id from a frontend; several if the id was used more than once.

    Raises:
        RequestNotFound: the frontend has no request with that id.
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        request = pb.GetRequestTimelineRequest(request_id=request_id)
        try:
            response = await stub.GetRequestTimeline(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls) from None
        return list(response.timelines)


async def list_requests(
    address: str, request: pb.ListRequestsRequest, *, tls: Tls | None = None
) -> pb.ListRequestsResponse:
    """One page of the request list of a frontend.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        try:
            response: pb.ListRequestsResponse = await stub.ListRequests(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls) from None
        return response


async def all_timelines(
    address: str, request_ids: Iterable[str], *, tls: Tls | None = None
) -> list[pb.RequestTimeline]:
    """Timelines of many requests from a frontend, a few at a time; those that it no longer has are left out.

    Raises:
        TandemError: a call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        places = asyncio.Semaphore(TIMELINES_AT_A_TIME)

        async def of(request_id: str) -> list[pb.RequestTimeline]:
            async with places:
                request = pb.GetRequestTimelineRequest(request_id=request_id)
                try:
                    response = await stub.GetRequestTimeline(request, timeout=CALL_TIMEOUT_S)
                except grpc.aio.AioRpcError as failure:
                    error = call_error(failure, address, tls)
                    if isinstance(error, RequestNotFound):
                        return []
                    raise error from None
            return list(response.timelines)

        found = await asyncio.gather(*(of(request_id) for request_id in request_ids))
    return [timeline for timelines in found for timeline in timelines]


async def frontend_figures(address: str, timeout_s: float = 2.0, *, tls: Tls | None = None) -> pb.WatchFiguresResponse:
    """Current statistics of a frontend.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        call = stub.WatchFigures(pb.WatchFiguresRequest(), timeout=timeout_s)
        try:
            response: pb.WatchFiguresResponse = await call.read()
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls) from None
        finally:
            call.cancel()
        return response


async def watch_figures(
    address: str, interval_ms: int, *, tls: Tls | None = None
) -> AsyncGenerator[pb.WatchFiguresResponse, None]:
    """Statistics of a frontend now and at each interval; closing the iterator ends the call.

    Raises:
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = FrontendAdminServiceStub(channel)
        call = stub.WatchFigures(pb.WatchFiguresRequest(interval_ms=interval_ms))
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                yield response
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls) from None
        finally:
            call.cancel()


async def capture_profile(
    address: str, request: pb.CaptureProfileRequest, *, tls: Tls | None = None
) -> AsyncGenerator[tuple[str, bytes], None]:
    """Record a profile and yield (name, content) of each file; closing the iterator ends the recording.

    Raises:
        AdminDisabled: profiles are disabled in the process.
        ProfileFailed: a file is shorter than announced.
        TandemError: the call failed.
    """
    async with open_channel(address, tls) as channel:
        stub: Any = ProfileServiceStub(channel)
        call = stub.CaptureProfile(request)
        name, size_bytes, data = "", 0, bytearray()
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.HasField("chunk"):
                    data += response.chunk
                if name and len(data) == size_bytes:
                    yield name, bytes(data)
                    name = ""
                if response.HasField("file"):
                    name, size_bytes, data = response.file.name, response.file.size_bytes, bytearray()
        except grpc.aio.AioRpcError as failure:
            raise call_error(failure, address, tls, has_responded=bool(name or size_bytes)) from None
        finally:
            call.cancel()
        if name:
            raise ProfileFailed(f"{name} is incomplete: received {len(data)} of {size_bytes} bytes")
