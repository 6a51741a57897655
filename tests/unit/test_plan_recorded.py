"""A recorded cluster as the subject of a plan: its requests, its engine's speeds, and the plan that they give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tandem_frontend.replay.fleet_file import FleetFile, parse_fleet
from tandem_frontend.replay.planning.command import PlanRequest, run_recorded
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.planning.recorded import fleet_of, seen, shape_of, trace_of
from tandem_frontend.replay.planning.search import Shape
from tandem_frontend.replay.planning.speeds import line_of, measured
from tandem_frontend.replay.simulation import replay
from tandem_frontend.replay.trace import TracedRequest, read_trace

from benchmarks.replay.made_traces import single_turn, write
from tandem.domain.recorded_load import RecordedCluster, RecordedFrontend, RecordedRequest
from tandem.domain.worker import WorkerRole
from tandem.errors import ConfigError, StartError

ENGINE: dict[str, Any] = {
    "prefill_step_s": 0.01,
    "prefill_tokens_per_s": 9_000,
    "decode_step_s": 0.012,
    "decode_request_s": 0.0005,
    "transfer_bytes_per_s": 2e9,
    "chunked_prefill_tokens": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "pairs": {
        "prefill": {"count": 2, "cache_blocks": 2000},
        "decode": {"count": 1, "kv_capacity_tokens": 200_000},
    },
    "aggregated": {"aggregated": {"count": 2, "cache_blocks": 2000}},
}
GOALS = Goals(ttft_s=2.0, itl_s=0.04, percentile=0.9)
BEGIN_S = 1_700_000_000.0


def fleet(shape: str) -> FleetFile:
    return parse_fleet({**SHAPES[shape], "engine": ENGINE})


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[TracedRequest]:
    rows = single_turn(120, seed=6, rate_per_s=2.5, mean_tokens=3000)
    return read_trace(write(rows, tmp_path_factory.mktemp("trace") / "made.jsonl"), 512)


def cluster(shape: str, trace: list[TracedRequest]) -> RecordedCluster:
    """What frontends would have recorded of a replay, whose engines' speeds are known."""
    served = replay(fleet(shape), fleet(shape).options(), trace, "least_work", 0).served
    size_bytes = fleet(shape).kv_bytes_per_token
    requests = []
    for one in served:
        prompt_s = BEGIN_S + one.arrival_s + one.queue_s + one.memory_s + one.prefill_wait_s
        first_s = BEGIN_S + one.arrival_s + one.ttft_s
        has_moved = shape == "pairs"
        requests.append(
            RecordedRequest(
                begin_s=BEGIN_S + one.arrival_s,
                is_finished=True,
                prompt_tokens=one.prompt_tokens,
                answer_tokens=one.answer_tokens,
                queue_s=one.queue_s,
                first_token_s=first_s,
                last_token_s=first_s + one.itl_s * (one.answer_tokens - 1),
                computed_by=one.prefill,
                prompt_begin_s=prompt_s,
                prompt_end_s=prompt_s + one.prompt_s,
                generated_by=one.decode,
                transfer_s=one.prompt_tokens * size_bytes / 2e9 if has_moved else None,
                transfer_bytes=one.prompt_tokens * size_bytes if has_moved else 0,
            )
        )
    figures = RecordedFrontend(name="frontend-0", open_requests=3, waiting_requests=2)
    workers = tuple(
        # The replay's own, with a memory that a worker can report.
        replace(worker, capabilities=replace(worker.capabilities, kv_capacity_tokens=200_000))
        for worker in fleet(shape).workers()
    )
    return RecordedCluster(
        model="m", workers=workers, frontends=(figures,), waiting_prompts=4, window_s=60, requests=tuple(requests)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_speeds_are_those_of_the_engine_that_was_recorded(shape: str, trace: list[TracedRequest]) -> None:
    speeds = measured(cluster(shape, trace).requests)
    options = speeds.options()
    assert options["prefill_tokens_per_s"] == pytest.approx(ENGINE["prefill_tokens_per_s"], rel=0.05)
    batch = speeds.batch_max / 2
    step_s = options["decode_step_s"] + batch * options["decode_request_s"]
    assert step_s == pytest.approx(ENGINE["decode_step_s"] + batch * ENGINE["decode_request_s"], rel=0.05)
    if shape == "pairs":
        assert speeds.transfer_bytes_per_s == pytest.approx(2e9)
    else:
        assert speeds.transfer_bytes_per_s is None


def test_a_line_is_fitted_and_no_part_is_negative() -> None:
    rows = [(1.0, x, 3.0 + 0.5 * x) for x in (1.0, 2.0, 5.0)]
    assert line_of(rows) == pytest.approx((3.0, 0.5))
    falling = line_of([(1.0, 1.0, 2.0), (1.0, 9.0, 1.0)])
    assert min(falling) == 0 < max(falling)
    assert line_of([(1.0, 4.0, 2.0)]) == pytest.approx((2.0, 0.0))


def test_a_recorded_trace_is_the_trace(trace: list[TracedRequest]) -> None:
    found = trace_of(cluster("pairs", trace).requests, 512)
    for one, recorded in zip(trace, found, strict=True):
        assert (recorded.prompt_tokens, recorded.answer_tokens) == (one.prompt_tokens, one.answer_tokens)
        assert recorded.arrival_s == pytest.approx(one.arrival_s, abs=1e-3)
        assert len(recorded.block_ids) == -(-one.prompt_tokens // 512)
    ids = [block for one in found for block in one.block_ids]
    assert len(ids) == len(set(ids)), "nothing was cached, so nothing is shared"


def test_what_is_not_known_yet_is_usual_and_what_was_cached_is_shared() -> None:
    done = [RecordedRequest(begin_s=n, is_finished=True, prompt_tokens=100, answer_tokens=40) for n in range(3)]
    waiting = RecordedRequest(begin_s=3, is_finished=False)
    running = RecordedRequest(begin_s=4, is_finished=False, prompt_tokens=90, answer_tokens=70, cached_tokens=48)
    *_, queued, longer = trace_of([*done, waiting, running], 16)
    assert (queued.prompt_tokens, queued.answer_tokens) == (100, 40)
    assert (longer.prompt_tokens, longer.answer_tokens) == (90, 70)
    assert longer.block_ids[:3] == (0, 1, 2)
    assert min(longer.block_ids[3:]) > 2**31


def test_requests_without_an_answer_are_refused() -> None:
    waiting = [RecordedRequest(begin_s=3, is_finished=False, prompt_tokens=10)]
    with pytest.raises(StartError, match="none of 1 requests has finished yet"):
        trace_of(waiting, 16)


def test_a_cluster_is_its_fleet(trace: list[TracedRequest]) -> None:
    found = fleet_of(cluster("pairs", trace), ENGINE, {})
    assert (found.prefill.count, found.decode.count, found.aggregated.count) == (2, 1, 0)
    assert found.decode.kv_capacity_tokens == 200_000
    assert found.prefill.cache_blocks == found.aggregated.cache_blocks == 200_000 // 512
    assert (found.block_tokens, found.frontend.count) == (512, 1)


def test_half_a_pair_alone_is_refused(trace: list[TracedRequest]) -> None:
    half = cluster("pairs", trace)
    half = replace(half, workers=tuple(one for one in half.workers if one.role is WorkerRole.PREFILL))
    with pytest.raises(StartError, match="no pair of a prefill and a decode worker serves"):
        fleet_of(half, ENGINE, {})


def test_pairs_whose_transfer_was_not_seen_are_not_planned(trace: list[TracedRequest]) -> None:
    speeds = measured(cluster("aggregated", trace).requests)
    assert shape_of(Shape.ANY, speeds)[0] is Shape.AGGREGATED
    with pytest.raises(ConfigError, match="shape: cannot be pairs: no KV transfer was seen"):
        shape_of(Shape.PAIRS, speeds)


def test_what_was_seen_is_printed(trace: list[TracedRequest]) -> None:
    lines = "\n".join(seen(replace(cluster("pairs", trace), missed_count=5), GOALS))
    assert "seen of m: 2 prefill + 1 decode; 120 requests (2." in lines
    assert "2 of 3 open requests wait in the frontends, 4 in the engines" in lines
    assert "TTFT p90 " in lines
    assert "5 requests were evicted before they were read" in lines


def planned(recorded: RecordedCluster, file: Path | None = None, **more: Any) -> str:
    request = PlanRequest(ttft_s=GOALS.ttft_s, itl_s=GOALS.itl_s, percentile=GOALS.percentile, **more)
    console = Console(width=160)
    with console.capture() as printed:
        assert run_recorded(request, recorded, file, console, Console(stderr=True)) is not None
    return printed.get()


def test_a_recorded_load_gives_the_plan_of_its_trace(trace: list[TracedRequest], tmp_path: Path) -> None:
    """Once with measured speeds, once with a file's."""
    recorded = cluster("pairs", trace)
    by_measurement = planned(recorded, shape="pairs")
    file = tmp_path / "fleet.json"
    file.write_text(fleet("pairs").model_dump_json())
    by_file = planned(recorded, file, shape="pairs")
    assert "measured: prompts" in by_measurement
    assert "measured" not in by_file
    plans = [line.split(":")[2] for text in (by_measurement, by_file) for line in text.splitlines() if "plan:" in line]
    assert plans[0] == plans[1]


def test_an_itl_below_the_measured_step_is_refused_by_name(trace: list[TracedRequest]) -> None:
    request = PlanRequest(ttft_s=2, itl_s=0.001, percentile=0.9)
    with pytest.raises(ConfigError, match="itl: must be at least one decode step of the fleet's engine"):
        run_recorded(request, cluster("pairs", trace), None, Console(quiet=True), Console(stderr=True))


def test_speeds_that_no_request_shows_are_refused() -> None:
    alone = RecordedRequest(begin_s=0, is_finished=True, prompt_tokens=10, answer_tokens=1)
    recorded = replace(cluster_of_one(), requests=(alone,))
    with pytest.raises(StartError, match="the speed of prompts is not known"):
        run_recorded(
            PlanRequest(ttft_s=2, itl_s=0.1, percentile=0.9), recorded, None, Console(quiet=True), Console(stderr=True)
        )


def cluster_of_one() -> RecordedCluster:
    return RecordedCluster(
        model="m", workers=fleet("aggregated").workers(), frontends=(), waiting_prompts=0, window_s=60
    )
