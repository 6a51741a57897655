"""Steps of a GPU run with several workers: which run on how many GPUs, and what their streams come to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.cached_chats import POLICIES, Figures
from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.local_cluster.cluster import ClusterSpec, LocalCluster
from tools.gpu import __main__ as command
from tools.gpu import (
    agreement,
    catalog,
    chats,
    fleets,
    measures,
    report,
    report_several,
    runs,
    shapes,
    summaries,
    takeovers,
)
from tools.gpu.callers import Callers, Heard, request_of
from tools.gpu.results import COMPLETE, FAILED, NO_TIME, NOT_RUN, PARTIAL, TAKEN, Results, state
from tools.gpu.several import Several
from tools.gpu.shapes import Fleet, Load, Machine
from tools.gpu.summaries import Streamed

LOAD = Load(kv_capacity_tokens=8192, running_requests_max=8)


def machine(gpus: int, logs: Path) -> Machine:
    return Machine(device="cuda", gpus=gpus, places=gpus, dtype="bfloat16", logs=logs)


def placed(fleet: Fleet, gpus: int, logs: Path, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    cluster = LocalCluster(shapes.cluster_spec(machine(gpus, logs), logs, LOAD, fleet, "a"))
    shapes.place(cluster, machine(gpus, logs), engine_gpus=fleet.engine_gpus, extra=extra)
    return {worker.name: json.loads(worker.flags["engine-extra"]) for worker in cluster.workers}


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        (1, []),
        (2, ["1p1d", "2a"]),
        (3, ["1p2d", "3a", "2p1d"]),
        (4, ["2p2d", "4a", "1p3d", "3p1d"]),
        (8, ["4p4d", "8a", "2p6d", "6p2d"]),
    ],
)
def test_fleets_use_all_gpus(gpus: int, names: list[str]) -> None:
    found = shapes.fleets_of(gpus)
    assert [fleet.name for fleet in found] == names
    assert {fleet.gpus for fleet in found} <= {gpus}
    assert [Fleet.named(name) for name in names] == found


@pytest.mark.parametrize("name", ["", "2p", "0p1d", "4a_tp2", "decode", "12a"])
def test_fleet_named_rejects_what_is_no_fleet(name: str) -> None:
    with pytest.raises(ValueError, match="is no fleet"):
        Fleet.named(name)


def test_place_gives_each_engine_gpus_of_its_own(tmp_path: Path) -> None:
    assert placed(Fleet(1, 2), 3, tmp_path) == {
        "prefill-0": {"base_gpu_id": 0},
        "decode-0": {"base_gpu_id": 1},
        "decode-1": {"base_gpu_id": 2},
    }
    assert placed(Fleet(1, 1, prefill_tp=2, tp=2), 4, tmp_path, {"page_size": 16}) == {
        "prefill-0": {"base_gpu_id": 0, "page_size": 16, "tp_size": 2},
        "decode-0": {"base_gpu_id": 2, "page_size": 16, "tp_size": 2},
    }
    assert placed(Fleet(1, 1, prefill_tp=2), 3, tmp_path) == {
        "prefill-0": {"base_gpu_id": 0, "tp_size": 2},
        "decode-0": {"base_gpu_id": 2},
    }


def test_place_on_a_cpu_names_no_gpu(tmp_path: Path) -> None:
    assert placed(Fleet(1, 1, prefill_tp=2), 0, tmp_path) == {"prefill-0": {"tp_size": 2}, "decode-0": {}}


def test_place_lets_engines_share_a_gpu(tmp_path: Path) -> None:
    shared = Machine(device="cuda", gpus=1, places=4, dtype="bfloat16", logs=tmp_path)
    cluster = LocalCluster(shapes.cluster_spec(shared, tmp_path, LOAD, Fleet(2, 2), "a"))
    shapes.place(cluster, shared, engine_gpus=Fleet(2, 2).engine_gpus)
    assert {worker.flags["engine-extra"] for worker in cluster.workers} == {'{"base_gpu_id": 0}'}
    assert shared.has_gpus_for(Fleet(2, 2).engine_gpus)
    # Ranks of one engine need a GPU each.
    assert not shared.has_gpus_for(Fleet(1, 1, prefill_tp=2, tp=2).engine_gpus)
    assert machine(4, tmp_path).has_gpus_for(Fleet(1, 1, prefill_tp=2, tp=2).engine_gpus)


@pytest.mark.parametrize(
    ("gpus", "left_out", "smaller"),
    [
        (4, set(), set()),
        (3, {"fleet_2p2d", "fleet_4a", "fleet_1p3d", "fleet_3p1d"},
         {"chats", "kill_decode_of_two", "kill_prefill_of_two", "rolling_restart", "tp2"}),
        (2, {"fleet_2p2d", "fleet_4a", "fleet_1p3d", "fleet_3p1d", "kill_prefill_of_two", "tp2_refused"},
         {"chats", "kill_decode_of_two", "rolling_restart", "tp2"}),
    ],
)  # fmt: skip
def test_outlook_says_which_steps_need_more_gpus(gpus: int, left_out: set[str], smaller: set[str]) -> None:
    rows = catalog.outlook(gpus)
    assert {row["step"] for row in rows if row["outlook"].startswith("not run: needs ")} == left_out
    assert {row["step"] for row in rows if row["outlook"].startswith("runs smaller")} == smaller
    for step in catalog.steps(gpus):
        fleet = step.fleet(gpus)
        assert fleet is None or fleet.gpus <= gpus
        # What is killed must have another of its role, and a pair's legs must be there.
        if fleet is not None and step.name.startswith("kill_"):
            role = "prefill" if "prefill" in step.name else "decode"
            assert max(getattr(fleet, role), fleet.aggregated) >= 2


def test_the_group_has_each_fleet_of_the_gpus_that_are_there() -> None:
    assert runs.expanded(("parity", "several"), 2)[:4] == ["parity", "fleet_1p1d", "fleet_2a", "fleet_planned"]
    assert set(catalog.group(4)) == {step.name for step in catalog.steps(4)} | {catalog.PLANNED}
    runs.check_steps(("several", "fleet_planned", "fleet_1p7d", "kills", *catalog.group(8)), 4)
    for name in ("fleet_1q", "chat", ""):
        with pytest.raises(ValueError, match="--steps: there is no step"):
            runs.check_steps((name,), 4)


def test_places_are_the_gpus_that_are_there_unless_a_cpu_rehearses() -> None:
    assert command.places("cuda", None, 2) == 2
    assert command.places("cuda", 1, 2) == 1
    assert command.places("cpu", None, 0) == 4
    for device, asked, found in (("cuda", 4, 2), ("cuda", None, 0), ("cpu", 0, 0)):
        with pytest.raises(ValueError, match="--gpus"):
            command.places(device, asked, found)


def test_state_of_a_step_is_complete_only_with_every_measurement() -> None:
    assert state({"a": TAKEN, "b": TAKEN}) == {"state": COMPLETE, "measurements": 2}
    assert state({"a": TAKEN, "b": "E: no"}) == {"state": PARTIAL, "measurements": 1, "missing": {"b": "E: no"}}
    assert state({"a": "E: no", "b": NO_TIME})["state"] == FAILED
    assert state({"a": NO_TIME}) == {"state": NOT_RUN, "reason": NO_TIME}
    assert state({}) == {"state": NOT_RUN, "reason": "nothing was measured"}


def test_step_records_what_was_missing_and_not_a_clusters_start(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", deadline_s=50)

    async def good() -> int:
        return 1

    async def bad() -> int:
        raise ValueError("no")

    async def started() -> None:
        await results.take("cluster", 0, good, proves=False)
        await results.take("cluster_measured", 0, bad)

    async def one_of_two() -> None:
        await results.take("first", 0, good)
        await results.take("second", 99, good)

    async def all_of_them() -> None:
        await results.step("started", started)
        await results.step("one_of_two", one_of_two)
        await results.step("raises", bad)
        results.leave_out("more", "needs 4 GPUs, and 2 are used")

    asyncio.run(all_of_them())
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["step_started"]["state"] == FAILED
    assert kept["step_started"]["missing"] == {"cluster_measured": "ValueError: no"}
    assert (kept["step_one_of_two"]["state"], kept["step_one_of_two"]["missing"]) == (PARTIAL, {"second": NO_TIME})
    assert kept["step_raises"]["state"] == FAILED
    assert kept["step_more"] == {"state": NOT_RUN, "reason": "needs 4 GPUs, and 2 are used"}


def test_results_are_added_only_to_those_of_the_same_machine_and_model(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = {"device": "cpu", "gpus": 4, "dtype": "float32", "model": Path("m"), "kv_tokens": 8}
    earlier = Results(file, 1)
    earlier.add_to(arguments)
    earlier.keep("arguments", {name: str(value) for name, value in arguments.items()})
    later = Results(file, 1)
    later.add_to(arguments)
    assert list(later.measured) == ["arguments"]
    with pytest.raises(ValueError, match=r"--device: .* was taken with cpu, not cuda"):
        later.add_to({**arguments, "device": "cuda"})


def test_agreement_counts_streams_and_tokens() -> None:
    found = agreement.agreement([[1, 2, 3], [1, 9, 3], [1, 2]], [[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert (found["streams"], found["streams_equal"]) == (3, 1)
    assert (found["tokens"], found["tokens_equal"], found["tokens_before_first_difference"]) == (9, 7, 6)
    assert found["first_differences_at"] == [1, 2]
    assert agreement.first_difference([1, 2, 3], [1, 2]) == 2


def test_agreement_for_each_token_counts_a_failed_one_as_different() -> None:
    assert agreement.per_token([1, 2, None, 4], [1, 9, 3, 4]) == {"tokens": 4, "equal": 2, "failed": 1, "share": 0.5}
    assert agreement.per_token([], [])["share"] is None


def streamed(arrivals_s: tuple[float, ...], **values: Any) -> Streamed:
    tokens = tuple(range(len(arrivals_s)))
    return Streamed(0.0, arrivals_s, token_ids=tokens, end_s=arrivals_s[-1] if arrivals_s else 9.0, **values)


def test_a_stream_is_whole_only_with_each_token_once() -> None:
    good = streamed((1.0, 2.0, 3.0))
    wrong = [streamed((1.0, 2.0)), streamed((1.0, 2.0, 3.0, 4.0)), streamed((1.0, 2.0, 3.0), in_order=False)]
    lost = streamed((1.0,), failure="UNAVAILABLE: gone")
    found = agreement.whole([good, *wrong, lost], 3)
    assert (found["streams"], found["lost"], found["whole"]) == (5, 1, 1)
    assert found["failures"] == ["UNAVAILABLE: gone"]


def test_takeover_times_those_that_the_victim_served_apart_from_the_others() -> None:
    victim, other = ("prefill-0", "decode-0"), ("prefill-0", "decode-1")
    streams = [
        # A token that was on its way arrives just after the kill: the pause is the one behind it.
        streamed((1.0, 2.0, 2.1, 5.1), workers=victim, attempts=2),
        streamed((1.0, 2.0, 2.6, 3.0), workers=other),
        # It had all that it needed of the victim, as a stream whose prompt is computed when a prefill worker dies.
        streamed((1.0, 2.0, 2.2, 2.3), workers=victim),
        streamed((0.5, 0.6, 0.7, 0.8), workers=victim),
        streamed((3.5, 4.0, 4.1, 4.2), workers=victim, attempts=2),
    ]
    found = agreement.takeover(streams, [tuple(range(4))] * 5, "decode-0", 2.05, 4)
    assert (found["on_the_victim"], found["went_on"], found["lost"], found["whole"]) == (3, 2, 0, 5)
    assert found["went_on_after_ms"] == {"p50": 1450.0, "max": 3000.0}
    assert found["others_longest_pause_ms"] == {"p50": 200.0, "max": 600.0}
    assert found["tokens"]["streams_equal"] == 5


def test_restarts_report_the_longest_pause_of_each_stream() -> None:
    streams = [streamed((1.0, 1.5, 4.0), workers=("a-0",)), streamed((0.5, 1.0, 1.5), workers=("a-1",), attempts=2)]
    found = agreement.restarts(streams, 3)
    assert (found["lost"], found["whole"], found["continued"]) == (0, 2, 1)
    assert found["by_worker"] == {"a-0": 1, "a-1": 1}
    assert found["longest_pause_of_a_stream_ms"] == {"p50": 500.0, "max": 2500.0}


def test_the_kill_waits_for_every_stream_or_for_a_prompt_of_the_victim() -> None:
    heard = [Heard(workers=("prefill-0", "decode-0")), Heard(workers=("prefill-1", "decode-0"))]
    assert not takeovers.ready(heard, "decode-0", at_token=2)
    assert takeovers.ready(heard, "prefill-0", at_token=0)
    heard[0].arrivals_s, heard[1].arrivals_s = [1.0, 2.0], [1.0]
    assert not takeovers.ready(heard, "decode-0", at_token=2)
    assert not takeovers.ready(heard, "prefill-0", at_token=0), "its prompt is computed"
    heard[1].arrivals_s.append(2.0)
    assert takeovers.ready(heard, "decode-0", at_token=2)


def test_heard_notes_the_route_the_order_of_chunks_and_the_attempt() -> None:
    heard = Heard()
    route = {"prefill_worker_id": "prefill-1", "decode_worker_id": "decode-0"}
    heard.take(pb.GenerateResponse(accepted={"route": route}))  # type: ignore[arg-type]
    heard.take(pb.GenerateResponse(chunk={"index": 0, "token_ids": [5]}))  # type: ignore[arg-type]
    heard.take(pb.GenerateResponse(chunk={"index": 1, "token_ids": [6, 7]}))  # type: ignore[arg-type]
    unfinished = heard.streamed(0.0, None, True)
    assert (unfinished.failure, unfinished.token_ids, unfinished.in_order) == ("no finish", (5, 6, 7), True)
    heard.take(pb.GenerateResponse(finish={"route": {**route, "attempt": 2}}))  # type: ignore[arg-type]
    ended = heard.streamed(0.0, None, True)
    assert (ended.failure, ended.workers, ended.attempts) == (None, ("prefill-1", "decode-0"), 2)
    assert ended.moved_bytes is None
    heard.take(pb.GenerateResponse(chunk={"index": 3}))  # type: ignore[arg-type]
    assert not heard.streamed(0.0, None, True).in_order


def test_a_request_has_a_salt_only_where_caches_must_have_nothing() -> None:
    assert not request_of([1], 2).HasField("cache_salt")
    assert request_of([1], 2, "alone").cache_salt == "alone"


def test_the_latest_plan_names_the_fleet_that_is_run() -> None:
    results: dict[str, Any] = {
        "fleet_2p2d_plan": {"fleet": {"prefill": 0, "decode": 0, "aggregated": 2}},
        "fleet_1p3d_plan": {"error": "RuntimeError: no"},
    }
    assert fleets.planned(results) == ("fleet_2p2d_plan", Fleet(aggregated=2))
    assert fleets.planned({"fleet_2p2d": {"started_s": 1}}) is None


def test_chats_report_hits_of_all_prompt_tokens() -> None:
    figures = Figures(ttft_s=[0.1, 0.3], prompt_tokens=400, cached_tokens=100, expected_tokens=120)
    found = chats.summary(figures)
    assert (found["requests"], found["hit_rate"], found["expected_hit_rate"]) == (2, 0.25, 0.3)
    assert found["ttft_ms"]["max"] == 300.0


def test_states_never_call_a_step_run_that_was_not() -> None:
    done = {"state": COMPLETE, "measurements": 2, "fleet": "2a", "gpus": 2, "smaller_than": "2p2d"}
    results: dict[str, Any] = {
        "arguments": {"device": "cpu", "gpus": "2"},
        "step_chats": {**done, "as_made_for_needs_gpus": 4},
        "step_tp2": {"state": PARTIAL, "measurements": 1, "missing": {"tp2_killed_rank": "E: no"}, "fleet": "1a_tp2"},
        "step_tp2_refused": {"state": NOT_RUN, "reason": "needs 3 GPUs, and 2 are used"},
        "step_parity": None,
    }
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in report_several.states(results).splitlines()}
    chats_row = "| chats | 2a | rehearsed on a CPU | instead of 2p2d, which needs 4 GPUs |"
    assert rows["chats"] == chats_row
    assert rows["tp2"] == "| tp2 | 1a_tp2 | rehearsed on a CPU in part | tp2_killed_rank: E: no |"
    assert rows["tp2_refused"] == "| tp2_refused |  | not run | needs 3 GPUs, and 2 are used |"
    for name in ("fleet_2p2d", "kill_prefill_of_two", "fleet_planned", "parity"):
        assert " | not run | " in rows[name]
    results["arguments"]["device"] = "cuda"
    assert "| run | instead of" in report_several.states(results)
    assert report_several.states({"step_pair": None}) == ""


def test_tables_show_a_fleets_levels_and_the_agreement_of_tp_2() -> None:
    level = summaries.summary([Streamed(0.0, (0.1, 0.2), workers=("aggregated-1",))])
    alike = agreement.agreement([[1, 2]], [[1, 3]])
    text = report.tables(
        {
            "fleet_2a_short_64": {"concurrent": 64, **level, "by_worker": {"aggregated-1": 1}},
            "fleet_2a_short_warm": {"concurrent": 8, **level},
            "tp2_streams": {"alone": alike, "together": alike, "reference_together": alike},
            "tp2_one_by_one": agreement.per_token([1, 2], [1, 2]),
        }
    )
    assert "| 2a | short | 64 | 100.0 | 100.0 | 100.0 | 100.0 |" in text
    assert text.count("| 2a |") == 1
    assert "| TP 2, one at a time | 0 of 1 | 1 of 2 |" in text
    assert "| TP 2, each token after those of TP 1 |  | 2 of 2 |" in text


def ran(tmp_path: Path, gpus: int, step: str, before: dict[str, Any] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """The clusters that a step asks for, which are not started, and what is recorded."""
    clusters: list[Any] = []

    async def with_cluster(name: str, spec: ClusterSpec, use: Any, prepare: Any) -> None:
        cluster = LocalCluster(spec)
        prepare(cluster)
        clusters.append((name, [json.loads(w.flags["engine-extra"]) for w in cluster.workers], len(cluster.frontends)))

    results = Results(tmp_path / "results.json", deadline_s=50)
    results.measured |= before or {}
    several = Several(
        machine=machine(gpus, tmp_path / "logs"),
        model=command.DEMO,
        load=LOAD,
        size=measures.REHEARSAL,
        callers=cast("Callers", None),
        results=results,
        with_cluster=with_cluster,
    )
    asyncio.run(several.run(step))
    return clusters, results.measured


def test_a_step_takes_a_smaller_fleet_and_records_which(tmp_path: Path) -> None:
    clusters, kept = ran(tmp_path, 2, "kill_decode_of_two")
    assert clusters == [("kill_decode_of_two_cluster", [{"base_gpu_id": 0}, {"base_gpu_id": 1}], 1)]
    step = kept["step_kill_decode_of_two"]
    assert (step["fleet"], step["gpus"], step["smaller_than"], step["as_made_for_needs_gpus"]) == ("2a", 2, "2p2d", 4)
    assert step["state"] == NOT_RUN, "nothing was measured"


def test_a_step_without_a_fleet_starts_nothing(tmp_path: Path) -> None:
    for step, gpus in (("kill_prefill_of_two", 2), ("fleet_1p3d", 3), ("tp2_refused", 2), ("chats", 1)):
        clusters, kept = ran(tmp_path, gpus, step)
        assert clusters == []
        assert kept[f"step_{step}"]["state"] == NOT_RUN
        assert f"and {gpus} are used" in kept[f"step_{step}"]["reason"]


def test_tp_2_runs_behind_its_reference_and_chats_have_a_frontend_for_each_policy(tmp_path: Path) -> None:
    clusters, _ = ran(tmp_path, 4, "tp2")
    one, two = ([{"base_gpu_id": 0}, {"base_gpu_id": 1}], [{"base_gpu_id": 0}, {"base_gpu_id": 2}])
    assert clusters == [
        ("tp2_reference", one, 1),
        ("tp2_cluster", [{**arguments, "tp_size": 2} for arguments in two], 1),
    ]
    ((_, extra, frontends),), _ = ran(tmp_path, 2, "chats")
    assert frontends == len(POLICIES)
    assert {arguments["page_size"] for arguments in extra} == {16}


def test_a_planned_fleet_that_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    plan = {"fleet_2p2d_plan": {"fleet": {"prefill": 0, "decode": 0, "aggregated": 2}}}
    clusters, kept = ran(tmp_path, 4, catalog.PLANNED)
    assert (clusters, kept["step_fleet_planned"]["state"]) == ([], NOT_RUN)
    clusters, _ = ran(tmp_path, 4, catalog.PLANNED, plan)
    assert [name for name, _, _ in clusters] == [catalog.PLANNED]
    clusters, kept = ran(tmp_path, 4, catalog.PLANNED, {**plan, "step_fleet_2a": {"state": COMPLETE}})
    assert clusters == []
    assert kept["fleet_planned"] == {"as": "fleet_2a", "by": "fleet_2p2d_plan"}
    assert kept["step_fleet_planned"]["state"] == COMPLETE
