"""What a running cluster has seen: its workers from the registry, its requests and queues from the frontends.

Owns the reading, and the refusal of a view or of frontends that cannot be trusted; `plan.py` plans with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf import duration_pb2

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.types.v1 import worker_pb2
from tandem.cli.membership import Membership, ask_all
from tandem.client import admin_calls, calls
from tandem.domain.recorded_load import RecordedCluster, RecordedFrontend, RecordedRequest
from tandem.errors import ConfigError, StartError, TandemError
from tandem.observability.timeline_lines import REFUSALS
from tandem.rpc.convert import seconds, worker_from_proto
from tandem.tls.paths import Tls

PAGE_SIZE = 1_000
POLL_S = 1.0
Key = tuple[str, str, int]
"""Frontend, request id and arrival in ns: an id may be used again."""


async def recorded_cluster(
    registries: Sequence[str], tls: Tls | None, *, model: str | None, window_s: float, observe_s: float = 0.0
) -> RecordedCluster:
    """Read a cluster.

    Args:
        registries: host:port of each.
        tls: client certificate; None: plaintext.
        model: of the workers and requests; None: the only one.
        window_s: requests that came so long before, at most.
        observe_s: how long to read on: a frontend keeps only its last finished requests.

    Raises:
        ConfigError: names the option.
        StartError: the view is stale, or without workers or frontends; or there were no requests.
        TandemError: a registry or frontend cannot be asked.
    """
    fleet = await ask_all(registries, tls)
    _check_view(fleet)
    name = _model(fleet, model)
    # Every frontend serves every model.
    frontends = [one.frontend for one in fleet.frontends if one.frontend.state == worker_pb2.WORKER_STATE_SERVING]
    if not frontends:
        raise StartError(f"no frontend serves {name}: what the cluster has seen is not known")
    reader = _Reader(frontends, tls, window_s)
    figures = await reader.read(observe_s)
    timelines = [one for one in reader.timelines.values() if one.model == name]
    requests = sorted(filter(None, map(recorded, timelines)), key=lambda one: one.begin_s)
    if not requests:
        raise StartError(f"no requests seen in the last {window_s + observe_s:g} s: nothing to plan for")
    workers = [one.worker for one in fleet.workers if one.worker.capabilities.model == name]
    serving = [one for one in workers if one.state == worker_pb2.WORKER_STATE_SERVING]
    return RecordedCluster(
        model=name,
        workers=tuple(worker_from_proto(one) for one in serving),
        frontends=tuple(_frontend(one.frontend_id, figures[one.frontend_id]) for one in frontends),
        waiting_prompts=sum(await asyncio.gather(*(_waiting(one.address, tls) for one in serving))),
        window_s=window_s + observe_s,
        requests=tuple(requests),
        missed_count=reader.missed_count,
    )


class _Reader:
    """Reads the timelines of some frontends, again and again."""

    def __init__(self, frontends: Sequence[worker_pb2.Frontend], tls: Tls | None, window_s: float) -> None:
        self._frontends = frontends
        self._tls = tls
        self._since_s = time.time() - window_s
        self.timelines: dict[Key, pb.RequestTimeline] = {}
        """The last one read of each request."""
        self._ended: set[Key] = set()
        self.missed_count = 0

    async def read(self, observe_s: float) -> dict[str, pb.WatchFiguresResponse]:
        """Read for `observe_s`, at least once. Returns the last figures of each frontend, by its id.

        Raises:
            TandemError: a frontend cannot be asked: its part of the load would be missing.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + observe_s
        figures = await self._read_all()
        # Read after the first lists and before the last ones, so that no request counts as missed that was not.
        asked = (admin_calls.frontend_figures(frontend.address, tls=self._tls) for frontend in self._frontends)
        before = await asyncio.gather(*asked)
        ended_before = len(self._ended)
        while (left_s := end_s - loop.time()) > 0:
            await asyncio.sleep(min(POLL_S, left_s))
            figures = await self._read_all()
        ended = sum(map(_ended_count, figures.values())) - sum(map(_ended_count, before))
        self.missed_count = max(0, ended - (len(self._ended) - ended_before))
        return figures

    async def _read_all(self) -> dict[str, pb.WatchFiguresResponse]:
        names = [frontend.frontend_id for frontend in self._frontends]
        return dict(zip(names, await asyncio.gather(*map(self._read, self._frontends)), strict=True))

    async def _read(self, frontend: worker_pb2.Frontend) -> pb.WatchFiguresResponse:
        figures = await admin_calls.frontend_figures(frontend.address, tls=self._tls)
        listed = await self._listed(frontend.address)
        keys = {(frontend.frontend_id, one.request_id, one.begin_time.ToNanoseconds()): one for one in listed}
        wanted = {key[1] for key in keys if key not in self._ended and key[1]}
        for timeline in await admin_calls.all_timelines(frontend.address, sorted(wanted), tls=self._tls):
            key = (frontend.frontend_id, timeline.request_id, timeline.begin.time.ToNanoseconds())
            if key in keys:
                self.timelines[key] = timeline
                if timeline.HasField("end"):
                    self._ended.add(key)
        return figures

    async def _listed(self, address: str) -> list[pb.RequestSummary]:
        """All requests of the window that a frontend still has."""
        listed: list[pb.RequestSummary] = []
        token: str | None = None
        while token != "":
            request = pb.ListRequestsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await admin_calls.list_requests(address, request, tls=self._tls)
            recent = [one for one in page.requests if seconds(one.begin_time) >= self._since_s]
            listed += recent
            token = page.next_page_token if len(recent) == len(page.requests) else ""
        return listed


def recorded(timeline: pb.RequestTimeline) -> RecordedRequest | None:
    """A timeline as a request to plan for; None: it was wrong itself, so that no worker would ever compute it."""
    if timeline.HasField("error_reason") and timeline.error_reason in REFUSALS:
        return None
    usage = timeline.usage
    known = timeline.prompt_tokens if timeline.HasField("prompt_tokens") else usage.prompt_tokens
    attempt = timeline.attempts[-1] if timeline.attempts else pb.TimelineAttempt()
    computing = attempt.prefill if attempt.HasField("prefill") else attempt.decode
    timings = computing.timings
    transfer_s = None
    if timings.HasField("kv_transfer_start_time") and timings.HasField("kv_transfer_end_time"):
        transfer_s = seconds(timings.kv_transfer_end_time) - seconds(timings.kv_transfer_start_time)
    return RecordedRequest(
        begin_s=seconds(timeline.begin.time),
        is_finished=timeline.outcome == pb.REQUEST_OUTCOME_FINISHED,
        prompt_tokens=known or None,
        answer_tokens=timeline.completion_tokens,
        cached_tokens=attempt.cached_tokens,
        queue_s=_queue_s(timeline),
        first_token_s=seconds(timeline.first_token.time) if timeline.HasField("first_token") else None,
        last_token_s=seconds(timeline.last_token.time) if timeline.HasField("last_token") else None,
        computed_by=computing.worker_id,
        prompt_begin_s=seconds(timings.prefill_start_time) if timings.HasField("prefill_start_time") else None,
        prompt_end_s=seconds(timings.prefill_end_time) if timings.HasField("prefill_end_time") else None,
        generated_by=attempt.decode.worker_id,
        transfer_s=transfer_s,
        transfer_bytes=timings.kv_transfer_bytes,
    )


def _queue_s(timeline: pb.RequestTimeline) -> float | None:
    waits = [one for one in timeline.steps if one.name == "wait" and one.HasField("end")]
    if not waits:
        return None
    return sum(seconds(one.end.time) - seconds(one.begin.time) for one in waits)


def _check_view(fleet: Membership) -> None:
    """Refuse to plan with a view that may be old.

    Raises:
        StartError: no registry has a live one.
    """
    if any(response.is_live for response in fleet.responses):
        return
    since = next((response.since for response in fleet.responses if response.since is not None), None)
    ago = "" if since is None else f", {(datetime.now(UTC) - since).total_seconds():.0f} s old"
    raise StartError(f"the registry's view is stale (the last known one{ago}): a plan needs a live view")


def _model(fleet: Membership, model: str | None) -> str:
    """The model to plan for.

    Raises:
        ConfigError: it has no worker, or there are several to choose from.
        StartError: no worker is registered.
    """
    serving = [one.worker for one in fleet.workers if one.worker.state == worker_pb2.WORKER_STATE_SERVING]
    names = sorted({worker.capabilities.model for worker in serving})
    if not names:
        raise StartError("no worker serves: a plan needs one, for its memory and speed")
    if model is None and len(names) > 1:
        raise ConfigError("model", f"is required: the workers serve {', '.join(names)}")
    if model is not None and model not in names:
        raise ConfigError("model", f"must be one of {', '.join(names)}, not {model!r}")
    return model or names[0]


def _frontend(name: str, figures: pb.WatchFiguresResponse) -> RecordedFrontend:
    ttft, itl = figures.time_to_first_token, figures.inter_token_latency
    return RecordedFrontend(
        name=name,
        open_requests=figures.open_requests,
        waiting_requests=figures.waiting_requests,
        ttft_s=(_s(ttft.p50), _s(ttft.p99)) if ttft.count else None,
        itl_s=(_s(itl.p50), _s(itl.p99)) if itl.count else None,
    )


async def _waiting(address: str, tls: Tls | None) -> int:
    """Requests that wait in an engine; 0 if it does not report them, or cannot be asked."""
    try:
        return (await calls.worker_load(address, tls=tls)).waiting_requests
    except TandemError:
        return 0


def _ended_count(figures: pb.WatchFiguresResponse) -> int:
    return figures.finished_requests + figures.failed_requests + figures.refused_requests + figures.cancelled_requests


def _s(duration: duration_pb2.Duration) -> float:
    return duration.ToNanoseconds() / 1e9
