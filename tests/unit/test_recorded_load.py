"""What `tandem plan` reads of a cluster: timelines as requests, and views that it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tandem.api.admin.v1 import admin_service_pb2 as pb
from tandem.api.registry.v1 import registry_service_pb2 as registry_pb
from tandem.api.types.v1 import error_pb2, worker_pb2
from tandem.cli import recorded_load
from tandem.cli.membership import Membership, RegistryResponse
from tandem.cli.recorded_load import recorded, recorded_cluster
from tandem.errors import ConfigError, StartError
from tandem.rpc.convert import timestamp, worker_to_proto
from tandem.tls.paths import Tls
from tests.unit.support.registry_workers import make_worker

BEGIN_S = 1_700_000_000.0


def moment(offset_s: float) -> pb.Moment:
    return pb.Moment(time=timestamp(BEGIN_S + offset_s))


def timeline() -> pb.RequestTimeline:
    """A finished request over a pair, in its second attempt."""
    made = pb.RequestTimeline(
        request_id="one",
        outcome=pb.REQUEST_OUTCOME_FINISHED,
        begin=moment(0),
        end=moment(3),
        first_token=moment(1),
        last_token=moment(3),
        completion_tokens=11,
        prompt_tokens=700,
        steps=[
            pb.TimelineStep(name="tokenise", begin=moment(0), end=moment(0.1)),
            pb.TimelineStep(name="wait", begin=moment(0.1), end=moment(0.35)),
        ],
        attempts=[pb.TimelineAttempt(number=1), pb.TimelineAttempt(number=2, cached_tokens=64)],
    )
    attempt = made.attempts[-1]
    attempt.prefill.worker_id, attempt.decode.worker_id = "prefill-1", "decode-0"
    timings = attempt.prefill.timings
    for name, at_s in (
        ("prefill_start_time", 0.4),
        ("prefill_end_time", 0.9),
        ("kv_transfer_start_time", 0.8),
        ("kv_transfer_end_time", 0.95),
    ):
        getattr(timings, name).CopyFrom(timestamp(BEGIN_S + at_s))
    timings.kv_transfer_bytes = 4096
    return made


def test_a_timeline_is_a_request_to_plan_for() -> None:
    one = recorded(timeline())
    assert one is not None
    assert (one.begin_s, one.is_finished) == (BEGIN_S, True)
    assert (one.prompt_tokens, one.answer_tokens, one.cached_tokens) == (700, 11, 64)
    assert one.queue_s == pytest.approx(0.25, abs=1e-6)
    assert (one.computed_by, one.generated_by) == ("prefill-1", "decode-0")
    assert one.prompt_begin_s == pytest.approx(BEGIN_S + 0.4)
    assert one.prompt_end_s == pytest.approx(BEGIN_S + 0.9)
    assert one.first_token_s == pytest.approx(BEGIN_S + 1)
    assert one.transfer_s == pytest.approx(0.15, abs=1e-6)
    assert one.transfer_bytes == 4096


def test_an_aggregated_worker_computes_the_prompt_itself() -> None:
    made = timeline()
    made.attempts[-1].decode.timings.CopyFrom(made.attempts[-1].prefill.timings)
    made.attempts[-1].ClearField("prefill")
    one = recorded(made)
    assert one is not None
    assert one.computed_by == one.generated_by == "decode-0"


def test_a_request_in_the_queue_has_no_times() -> None:
    one = recorded(pb.RequestTimeline(outcome=pb.REQUEST_OUTCOME_OPEN, begin=moment(0)))
    assert one is not None
    assert not one.is_finished
    assert one.prompt_tokens is one.queue_s is one.first_token_s is one.prompt_begin_s is one.transfer_s is None
    assert one.computed_by == one.generated_by == ""


@pytest.mark.parametrize(
    ("reason", "is_load"),
    [
        (error_pb2.ERROR_REASON_OVERLOADED, True),
        (error_pb2.ERROR_REASON_LEG_FAILED, True),
        (error_pb2.ERROR_REASON_INVALID_REQUEST, False),
        (error_pb2.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED, False),
    ],
)
def test_what_was_refused_for_its_own_fault_is_no_load(
    reason: error_pb2.ErrorReason.ValueType, *, is_load: bool
) -> None:
    made = pb.RequestTimeline(outcome=pb.REQUEST_OUTCOME_REFUSED, begin=moment(0), error_reason=reason)
    assert (recorded(made) is not None) == is_load


def membership(
    models: Sequence[str], source: registry_pb.ViewSource.ValueType = registry_pb.VIEW_SOURCE_LIVE
) -> Membership:
    listed = registry_pb.ListResponse(source=source, source_since=timestamp(BEGIN_S))
    workers = [
        registry_pb.ListedWorker(
            worker=worker_pb2.Worker(
                worker_id=f"prefill-{number}",
                state=worker_pb2.WORKER_STATE_SERVING,
                capabilities=worker_pb2.WorkerCapabilities(model=model),
            )
        )
        for number, model in enumerate(models)
    ]
    return Membership(tuple(workers), (), (RegistryResponse("registry:1", listed),))


async def refusal(monkeypatch: pytest.MonkeyPatch, fleet: Membership, model: str | None = None) -> StartError:
    async def answer(addresses: Sequence[str], tls: Tls | None) -> Membership:
        return fleet

    monkeypatch.setattr(recorded_load, "ask_all", answer)
    with pytest.raises(StartError) as refused:
        await recorded_cluster(["registry:1"], None, model=model, window_s=60)
    return refused.value


async def test_a_stale_view_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = await refusal(monkeypatch, membership(["m"], registry_pb.VIEW_SOURCE_LAST_KNOWN))
    assert str(problem).startswith("the registry's view is stale (the last known one, ")


async def test_a_view_without_workers_or_frontends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no worker serves" in str(await refusal(monkeypatch, membership([])))
    assert "no frontend serves m" in str(await refusal(monkeypatch, membership(["m"])))


async def test_one_of_several_models_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = await refusal(monkeypatch, membership(["m", "n"]))
    assert isinstance(problem, ConfigError)
    assert (problem.key, str(problem)) == ("model", "model: is required: the workers serve m, n")


class Reads:
    """A reader that has found one request of each model at every frontend."""

    missed_count = 0

    def __init__(self, frontends: Sequence[worker_pb2.Frontend], tls: Tls | None, window_s: float) -> None:
        self._names = [frontend.frontend_id for frontend in frontends]
        self.timelines: dict[object, pb.RequestTimeline] = {}
        for number, model in enumerate(("m", "other", "m")):
            made = timeline()
            made.model, made.prompt_tokens = model, 100 + number
            self.timelines[number] = made

    async def read(self, observe_s: float) -> dict[str, pb.WatchFiguresResponse]:
        return dict.fromkeys(self._names, pb.WatchFiguresResponse())


async def test_requests_of_other_models_are_no_load_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frontend serves every model, whichever it has in its entry."""
    workers = [make_worker(model, model=model) for model in ("m", "other")]
    frontend = worker_pb2.Frontend(frontend_id="f", model="*", state=worker_pb2.WORKER_STATE_SERVING)
    fleet = Membership(
        tuple(registry_pb.ListedWorker(worker=worker_to_proto(worker)) for worker in workers),
        (registry_pb.ListedFrontend(frontend=frontend),),
        membership([]).responses,
    )

    async def answer(addresses: Sequence[str], tls: Tls | None) -> Membership:
        return fleet

    async def waiting(address: str, tls: Tls | None) -> int:
        return 0

    monkeypatch.setattr(recorded_load, "ask_all", answer)
    monkeypatch.setattr(recorded_load, "_waiting", waiting)
    monkeypatch.setattr(recorded_load, "_Reader", Reads)
    cluster = await recorded_cluster(["registry:1"], None, model="m", window_s=60)
    assert [one.prompt_tokens for one in cluster.requests] == [100, 102]
    assert ([one.worker_id for one in cluster.workers], len(cluster.frontends)) == (["m"], 1)
