"""`tandem trace`: one request's timeline, asked of every frontend, without any collector of traces.

Owns the finding of the frontend that knows the request; the text is `timeline.py`'s.
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
    """Who is asked."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Found:
    """What one frontend knows."""

    frontend: Frontend
    timelines: tuple[pb.RequestTimeline, ...] = ()
    problem: TandemError | None = None
    """Why it said nothing, where it should have."""


async def frontends_of(registries: Sequence[str], tls: Tls | None) -> list[Frontend]:
    """All frontends the registries list.

    Raises:
        StartError: there is none.
        TandemError: no registry answers.
    """
    listed = [entry.frontend for entry in (await ask_all(registries, tls)).frontends]
    if not listed:
        raise StartError("no frontend is registered")
    return [Frontend(frontend.frontend_id, frontend.address) for frontend in listed]


async def trace(request_id: str, frontends: Sequence[Frontend], *, as_json: bool, tls: Tls | None = None) -> int:
    """Print what the frontends know of a request. Returns the exit status.

    Raises:
        RequestNotFound: all of them answer, and none knows it.
        TandemError: none knows it, and one does not answer.
    """
    answers = await asyncio.gather(*(_ask(frontend, request_id, tls) for frontend in frontends))
    found = [(answer.frontend, timeline) for answer in answers for timeline in answer.timelines]
    if not found:
        raise _not_found(request_id, answers)
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
        return Found(frontend, problem=StartError(f"{frontend.address} is not a frontend that tells timelines"))
    except TandemError as problem:
        return Found(frontend, problem=problem)


def _not_found(request_id: str, answers: Sequence[Found]) -> TandemError:
    problems = [answer for answer in answers if answer.problem is not None]
    for answer in problems:
        assert answer.problem is not None
        return answer.problem
    names = ", ".join(answer.frontend.name for answer in answers)
    return RequestNotFound(f"no request {request_id} is known to {names}, or no longer", request_id=request_id)
