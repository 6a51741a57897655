"""ProfileService on the wire: protobuf to `tandem.observability.profiles` and back, with the limits of its fields."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.admin.v1 import admin_service_pb2_grpc as pb_grpc
from tandem.errors import InvalidRequest
from tandem.observability.profiles import Part, ProfileFile, Profiles, Started, Wanted

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ProfileService"].full_name
PREFIX = "PROFILE_FORMAT_"

DURATION_MS, DURATION_MS_MIN, DURATION_MS_MAX = 5_000, 100, 60_000
SIZE_BYTES, SIZE_BYTES_MIN, SIZE_BYTES_MAX = 64 * 2**20, 2**10, 256 * 2**20
STEPS, STEPS_MIN, STEPS_MAX = 500, 1, 10_000


class ProfileServicer(pb_grpc.ProfileServiceServicer):
    """The contract of admin_service.proto."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    async def CaptureProfile(  # noqa: N802
        self, request: pb.CaptureProfileRequest, context: Any
    ) -> AsyncIterator[pb.CaptureProfileResponse]:
        """Record, then send. Cancelled with the call."""
        wanted = Wanted(
            duration_s=_within(request, "duration_ms", DURATION_MS, DURATION_MS_MIN, DURATION_MS_MAX) / 1_000,
            size_bytes_max=_within(request, "size_bytes_max", SIZE_BYTES, SIZE_BYTES_MIN, SIZE_BYTES_MAX),
            steps_max=_within(request, "steps_max", STEPS, STEPS_MIN, STEPS_MAX),
            with_stack=request.with_stack,
            form=_form(request.format),
        )
        file_count = 0
        async with contextlib.aclosing(self._profiles.capture(wanted)) as parts:
            async for part in parts:
                file_count += isinstance(part, ProfileFile)
                yield _message(part)
        yield pb.CaptureProfileResponse(finished=pb.ProfileFinished(files=file_count))


def _within(request: pb.CaptureProfileRequest, field: str, default: int, least: int, most: int) -> int:
    if not request.HasField(field):  # type: ignore[arg-type]
        return default
    value = int(getattr(request, field))
    if not least <= value <= most:
        raise InvalidRequest(field, f"must be {least} to {most}, not {value}")
    return value


def _form(number: pb.ProfileFormat.ValueType) -> str | None:
    if number == pb.PROFILE_FORMAT_UNSPECIFIED:
        return None
    if number not in pb.ProfileFormat.values():
        raise InvalidRequest("format", f"unknown format {number}")
    return pb.ProfileFormat.Name(number).removeprefix(PREFIX).lower()


def _message(part: Part) -> pb.CaptureProfileResponse:
    if isinstance(part, Started):
        number = pb.ProfileFormat.Value(PREFIX + part.form.upper())
        return pb.CaptureProfileResponse(
            started=pb.ProfileStarted(format=number, duration_ms=round(part.duration_s * 1_000))
        )
    if isinstance(part, ProfileFile):
        return pb.CaptureProfileResponse(file=pb.ProfileFile(name=part.name, size_bytes=part.size_bytes))
    return pb.CaptureProfileResponse(chunk=part)
