"""Statistics and tables of many concurrent streams: hand-made arrivals in, known numbers out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import decode_crowd, decode_heavy, report, runs, summaries
from tools.gpu.decode_heavy import Asked, Bare, Heavy
from tools.gpu.overhead import bare_settings
from tools.gpu.results import Results
from tools.gpu.shapes import Machine
from tools.gpu.summaries import Streamed

SMALL = Heavy(
    prompt_tokens=4, new_tokens=6, levels=(1, 2, 8), turned_level=2, kv_tokens={1: 40, 2: 20}, running_requests_max=8
)


def test_tokens_of_one_message_are_one_arrival() -> None:
    stream = Streamed(0.0, (1.0, 1.0, 1.0, 3.0, 3.5, 3.5))
    assert summaries.gaps_between_arrivals_s(stream) == [2.0, 0.5]


def test_the_steady_pace_counts_only_while_all_streams_run() -> None:
    early = Streamed(0.0, (1.0, 2.0, 3.0, 4.0))
    late = Streamed(0.0, (2.0, 3.0, 4.0, 5.0, 6.0))
    # From 2 s to 4 s: two tokens of each.
    assert summaries.steady_tokens_per_s([early, late]) == 2.0
    assert summaries.steady_tokens_per_s([early, Streamed(0.0, (4.0, 5.0))]) is None


def test_steady_gaps_leave_out_what_came_before_all_streams_ran() -> None:
    early = Streamed(0.0, (1.0, 5.0, 6.0, 7.0))
    late = Streamed(0.0, (5.0, 5.5, 6.0, 9.0))
    assert summaries.steady_gaps_s([early, late]) == [1.0, 1.0, 0.5, 0.5]


def test_a_level_reports_its_rates_and_why_streams_failed() -> None:
    good = [Streamed(0.0, (0.1, 0.2, 0.4, 0.4)), Streamed(0.1, (0.3, 0.5, 0.5, 0.6))]
    bad = [Streamed(0.0, (), reason) for reason in ("c", "a", "b", "a")]
    level = summaries.decoding([*good, *bad])
    assert (level["failed"], level["failures"]) == (4, ["a", "b"])
    assert (level["tokens"], level["wall_s"]) == (8, 0.6)
    assert level["tokens_per_s"] == pytest.approx(13.3)
    assert level["itl_mean_p50_ms"] == pytest.approx(100.0)
    assert level["gap_p99_ms"] == pytest.approx(200.0)
    assert level["ttft_p50_ms"] == pytest.approx(100.0)
    assert summaries.decoding(bad) == {"failed": 4, "failures": ["a", "b"]}


def test_cores_are_processor_time_over_the_streams_time() -> None:
    streams = [Streamed(10.0, (11.0, 14.0)), Streamed(12.0, (), "gone")]
    assert summaries.cores(streams, {"frontend-0": 2.0}) == {"frontend-0": 0.5}
    assert summaries.cores(streams[1:], {"frontend-0": 2.0}) == {}


def test_a_ratio_is_tandem_over_bare_and_there_is_none_of_what_was_not_measured() -> None:
    bare = {"steady_tokens_per_s": 200.0, "gap_p99_ms": 10.0}
    ours = {"steady_tokens_per_s": 150.0, "gap_p99_ms": 15.0}
    assert summaries.ratios(bare, ours) == {"steady_tokens_per_s": 0.75, "gap_p99_ms": 1.5, "steady_gap_p99_ms": None}
    assert set(summaries.ratios({"error": "no"}, ours).values()) == {None}
    assert summaries.ratios({**bare, "steady_tokens_per_s": None}, ours)["steady_tokens_per_s"] is None


def test_a_level_is_measured_in_both_orders_without_those_that_do_not_fit() -> None:
    assert list(SMALL.order(80)) == [(1, "bare"), (2, "bare"), (2, "tandem"), (8, "bare")]
    assert list(SMALL.order(79)) == [(1, "bare"), (2, "bare"), (2, "tandem")]


def test_every_level_finds_room_where_each_gpu_has_at_most_two_engines() -> None:
    heavy = decode_heavy.GPU
    for sharing in (1, 2):
        assert {level for level, _ in heavy.order(heavy.kv_tokens[sharing])} == set(heavy.levels)


def test_a_bare_engine_is_placed_where_the_worker_of_its_number_would_be() -> None:
    for gpus, number, expected in ((2, 0, 0), (2, 1, 1), (1, 1, 0)):
        machine = Machine(device="cuda", gpus=gpus, dtype="bfloat16", logs=Path("logs"))
        assert bare_settings(machine, SMALL.load(2, 4), number)["extra"] == {"base_gpu_id": expected}


class ScriptedWorker:
    """A bare engine that answers each list at once."""

    def __init__(self, failure: str | None = None) -> None:
        self.works: list[dict[str, Any]] = []
        self.failure = failure

    def send(self, works: list[dict[str, Any]]) -> None:
        self.works = works

    async def read(self) -> dict[str, Any]:
        stream = {"begin_s": 0.0, "times_s": [1.0, 2.0], "failure": self.failure}
        return {"streams": [{"rid": work["rid"], **stream} for work in self.works], "cpu_s": 0.5}


def asked(*engines: ScriptedWorker) -> Asked:
    bare = Bare(dict(zip(("prefill", "decode"), engines, strict=True)), {"host": "h", "port": 1}, 100)  # type: ignore[arg-type]
    return asyncio.run(bare.ask(SMALL, 2, 7))


def test_both_engines_of_a_bare_pair_get_the_same_requests_and_either_can_fail_them() -> None:
    prefill, decode = ScriptedWorker(), ScriptedWorker()
    answer = asked(prefill, decode)
    assert prefill.works == decode.works
    assert len({work["room"] for work in decode.works}) == len({work["rid"] for work in decode.works}) == 2
    assert [stream.failure for stream in answer.streams] == [None, None]
    assert answer.cpu_s == {"bare-prefill": 0.5, "bare-decode": 0.5}
    assert [stream.failure for stream in asked(ScriptedWorker("gone"), ScriptedWorker()).streams] == ["gone", "gone"]


class Side:
    """Answers every level, or fails it."""

    def __init__(self, name: str, said: list[str], pace: float | None) -> None:
        self.name, self.said, self.pace = name, said, pace

    async def ask(self, heavy: Heavy, level: int, seed: int) -> Asked:
        self.said.append(f"{level} {self.name}")
        if self.pace is None:
            raise RuntimeError("no")
        arrivals_s = tuple(number / self.pace for number in range(1, heavy.new_tokens + 1))
        return Asked([Streamed(0.0, arrivals_s)] * level, {self.name: 1.0})


def compared(tmp_path: Path, tandem_pace: float | None) -> tuple[list[str], dict[str, Any]]:
    said: list[str] = []
    results = Results(tmp_path / "results.json", deadline_s=90)
    sides = (Side("bare", said, 10.0), Side("tandem", said, tandem_pace))
    asyncio.run(decode_heavy.compare(results, "decode_heavy_pair", SMALL, SMALL.load(2, 1), *sides))  # type: ignore[arg-type]
    return said, results.measured


def test_sides_take_turns_and_each_measurement_is_a_result(tmp_path: Path) -> None:
    said, kept = compared(tmp_path, 5.0)
    assert said == ["1 bare", "1 tandem", "2 bare", "2 tandem", "2 tandem", "2 bare"]
    assert kept["decode_heavy_pair_2_tandem_first_bare"]["steady_tokens_per_s"] == 20.0
    assert kept["decode_heavy_pair_2_ratios"] == {
        "steady_tokens_per_s": 0.5,
        "gap_p99_ms": 2.0,
        "steady_gap_p99_ms": 2.0,
    }
    lines = report.tables(kept).splitlines()
    assert len(lines) == 8
    assert lines[2].startswith("| 1 | pair | bare first | bare | 10.0 | 10.0 | 100.0 | 100.0 |")
    assert lines[6].startswith("| 2 | pair | Tandem first | tandem | 10.0 | 10.0 |")
    assert lines[6].endswith("| 0 | 0.5 | 2.0 | 2.0 | tandem 0.83 |")


def test_a_side_that_fails_does_not_keep_the_other(tmp_path: Path) -> None:
    said, kept = compared(tmp_path, None)
    assert len(said) == 6
    assert kept["decode_heavy_pair_2_tandem"]["error"] == "RuntimeError: no"
    assert set(kept["decode_heavy_pair_2_ratios"].values()) == {None}
    assert report.tables(kept).count("| bare |") == 3


def test_the_step_is_one_of_those_that_run() -> None:
    assert "decode_heavy" in runs.STEPS


def test_ratios_of_the_crowd_are_taken_within_a_round() -> None:
    measured = {
        "crowd_0_bare": {"tokens_per_s": 1.0}, "crowd_0_tandem": {"tokens_per_s": 1.0},
        "crowd_1_bare": {"tokens_per_s": 100.0, "itl_mean_p50_ms": 2.0}, "crowd_1_tandem": {"tokens_per_s": 90.0},
        "crowd_2_bare": {"tokens_per_s": 200.0}, "crowd_2_tandem": {"skipped": "no time"},
    }  # fmt: skip
    assert decode_crowd.ratios(measured, "crowd", ("bare", "tandem")) == {
        "bare": {"tokens_per_s": [1.0, 1.0], "itl_mean_p50_ms": [1.0]},
        "tandem": {"tokens_per_s": [0.9]},
    }
