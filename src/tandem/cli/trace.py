"""`tandem trace`: the timeline of one request, fetched from the frontends; needs no trace collector.

Owns the search for the frontend that has the request; `timeline.py` renders it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.cli.membership import ask_all
from tandem.cli.timeline import render
from tandem.client import admin_calls
from tandem.errors import NotSupported, RequestNotFound, StartError, TandemError
from tandem.tls.paths import Tls


@dataclass(frozen=True, slots=True)
class Frontend:
    """A frontend to query."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Found:
    """The result of querying one frontend."""

    frontend: Frontend
    timelines: tuple[pb.RequestTimeline, ...] = ()
    problem: TandemError | None = None
    """Why the query failed; None: it succeeded, or the request is unknown there."""


async def frontends_of(registries: Sequence[str], tls: Tls | None) -> list[Frontend]:
    """All frontends the registries list.

    Raises:
        StartError: no frontend is registered.
        TandemError: no registry can be reached.
    """
    listed = [entry.frontend for entry in (await ask_all(registries, tls)).frontends]
    if not listed:
        raise StartError("no frontend is registered")
    return [Frontend(frontend.frontend_id, frontend.address) for frontend in listed]


async def trace(request_id: str, frontends: Sequence[Frontend], *, as_json: bool, tls: Tls | None = None) -> int:
    """Print the timelines of a request from all frontends. Returns the exit status.

    Raises:
        RequestNotFound: all frontends responded, and none has the request.
        TandemError: none has it, and at least one could not be queried.
    """
    results = await asyncio.gather(*(_ask(frontend, request_id, tls) for frontend in frontends))
    found = [(result.frontend, timeline) for result in results for timeline in result.timelines]
    if not found:
        raise _not_found(request_id, results)
    found.sort(key=lambda pair: pair[1].begin.time.ToNanoseconds())
    if as_json:
        for frontend, timeline in found:
            fields = MessageToDict(timeline, preserving_proto_field_name=True)
            print(json.dumps({"frontend_id": frontend.name, "timeline": fields}))
        return 0
    width = shutil.get_terminal_size((100, 24)).columns
    print("\n\n".join(render(timeline, frontend.name, width=width) for frontend, timeline in found))
    return 0


async def _ask(frontend: Frontend, request_id: str, tls: Tls | None) -> Found:
    try:
        return Found(frontend, tuple(await admin_calls.request_timelines(frontend.address, request_id, tls=tls)))
    except RequestNotFound:
        return Found(frontend)
    except NotSupported:
        return Found(
            frontend, problem=StartError(f"{frontend.address} is not a Tandem frontend: it has no admin service")
        )
    except TandemError as problem:
        return Found(frontend, problem=problem)


def _not_found(request_id: str, results: Sequence[Found]) -> TandemError:
    # A failed query is reported first: the frontend that could not be queried may have the request.
    problems = [result.problem for result in results if result.problem is not None]
    if problems:
        return problems[0]
    names = ", ".join(result.frontend.name for result in results)
    return RequestNotFound(
        f"request {request_id} not found on {names} (each keeps the timelines of its last finished requests only)",
        request_id=request_id,
    )
