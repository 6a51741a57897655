"""`tandem plan` for traces: more load needs more workers, each kind of load its own, and the plan holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.replay.fleet_file import parse_fleet
from tandem_frontend.replay.planning.candidate import Candidate, judged
from tandem_frontend.replay.planning.counts import Counts
from tandem_frontend.replay.planning.goals import Goals
from tandem_frontend.replay.simulation import replay
from tandem_frontend.replay.trace import read_trace, scaled, spread

from benchmarks.replay.made_traces import single_turn, write
from tandem.cli.app import run

GOALS = {"ttft": 2.0, "itl": 0.03, "percentile": 0.95}
FLEET: dict[str, Any] = {
    "prefill": {"count": 1, "cache_blocks": 1000},
    "decode": {"count": 1, "kv_capacity_tokens": 200_000, "running_requests_max": 32},
    "aggregated": {"cache_blocks": 1000, "running_requests_max": 32},
    "engine": {
        "prefill_tokens_per_s": 12_000,
        "decode_step_s": 0.012,
        "decode_request_s": 0.0004,
        "transfer_bytes_per_s": 50e9,
        "jitter": 0.02,
    },
}


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps(FLEET))
    return file


def made(tmp_path: Path, requests: int, rate_per_s: float, prompt: int, answer: int | None = None) -> Path:
    """A trace; `answer`: all answers are about so long."""
    rows = single_turn(requests, seed=3, rate_per_s=rate_per_s, mean_tokens=prompt)
    if answer is not None:
        rng = random.Random(4)
        rows = [{**row, "output_length": rng.randint(answer // 2, 3 * answer // 2)} for row in rows]
    return write(rows, tmp_path / "trace.jsonl")


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["tandem", "plan", *arguments])
    return run()


def plan(monkeypatch: pytest.MonkeyPatch, trace: Path, fleet: Path, *more: str) -> dict[str, Any]:
    figures = fleet.with_name("plan.json")
    goals = [text for name, value in GOALS.items() for text in (f"--{name}", str(value))]
    assert planned(monkeypatch, str(trace), "--fleet", str(fleet), *goals, "--json", str(figures), *more) == 0
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def replayed(trace: Path, counts: Counts, seed: int, load: float = 1.0) -> Candidate:
    """A fleet by a replay of its own, without the search."""
    fleet = counts.fleet(parse_fleet(FLEET))
    requests = spread(scaled(read_trace(trace, fleet.block_tokens), load), seed)
    goals = Goals(ttft_s=GOALS["ttft"], itl_s=GOALS["itl"], percentile=GOALS["percentile"])
    return judged(counts, seed, replay(fleet, fleet.options(), requests, "auto", seed), goals)


def test_a_bigger_load_needs_more_workers_and_the_plan_holds(
    tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = made(tmp_path, 160, 3.0, 3000)
    totals = []
    for load in (1.0, 3.0):
        found = plan(monkeypatch, trace, fleet, "--load", str(load))
        counts = Counts(**found["plan"]["counts"])
        totals.append(counts.total)
        # Another seed than the two of the plan.
        assert replayed(trace, counts, 7, load).reaches
        for smaller in counts.smaller():
            assert not replayed(trace, smaller, 7, load).reaches
        assert len(found["candidates"]) <= 40
        assert found["complete"]
    assert totals[1] > totals[0]


def test_long_prompts_need_prefill_and_long_answers_decode(
    tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = plan(monkeypatch, made(tmp_path, 100, 6.0, 6000, 20), fleet, "--shape", "pairs")["plan"]["counts"]
    answers = plan(monkeypatch, made(tmp_path, 100, 6.0, 200, 600), fleet, "--shape", "pairs")["plan"]["counts"]
    assert prompts["prefill"] > prompts["decode"]
    assert answers["decode"] > answers["prefill"]


def test_a_plan_prints_its_reasons(
    tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(monkeypatch, made(tmp_path, 120, 6.0, 4000), fleet, "--shape", "pairs")
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in ("within both", "misses TTFT", "plan: ", "one prefill worker fewer misses TTFT", "with another seed"):
        assert words in printed.out
    missing = next(one for one in found["smaller"] if one["counts"]["prefill"] < found["plan"]["counts"]["prefill"])
    assert "prompts before it" in missing["limit"] or "the frontend's queue, in front of prefill" in missing["limit"]
    assert found["plan"]["within"] >= GOALS["percentile"] - 0.05
    assert set(found["plan"]["busy"]) == {"prefill", "decode"}


def test_the_same_seed_gives_the_same_plan(tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = made(tmp_path, 80, 4.0, 2000)
    assert plan(monkeypatch, trace, fleet) == plan(monkeypatch, trace, fleet)


def test_goals_that_no_fleet_reaches_end_with_status_1(
    tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TTFT below the time of a prompt alone: more workers do not help."""
    trace = made(tmp_path, 40, 2.0, 6000)
    arguments = ("--ttft", "0.05", "--itl", "0.1", "--workers-max", "8")
    assert planned(monkeypatch, str(trace), "--fleet", str(fleet), *arguments) == 1
    out = capsys.readouterr().out
    assert "no fleet of up to 8 workers" in out
    assert "limited by the computation of the prompt itself" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ttft", "0"), "--ttft: must be a number of seconds above 0, not 0"),
        (("--ttft", "-1"), "--ttft: must be a number of seconds above 0, not -1"),
        (("--ttft", "nan"), "--ttft: must be a number of seconds above 0, not nan"),
        (("--itl", "0"), "--itl: must be a number of seconds above 0, not 0"),
        (("--itl", "0.01"), "--itl: must be at least one decode step of the fleet's engine, 12.2 ms, not 10 ms"),
        (("--percentile", "1"), "--percentile: must be above 0 and below 1, such as 0.99, not 1"),
        (("--percentile", "0"), "--percentile: must be above 0 and below 1, such as 0.99, not 0"),
        (("--percentile", "99"), "--percentile: must be above 0 and below 1, such as 0.99, not 99"),
        (("--workers-max", "0"), "--workers-max: must be 1 to 1024, not 0"),
        (("--replays-max", "0"), "--replays-max: must be 1 to 1000, not 0"),
        (("--shape", "triples"), "--shape: must be one of any, pairs, aggregated, not 'triples'"),
        (("--policy", "fastest"), "--policy: must be some of auto, "),
        (("--load", "0"), "--load: must be above 0, at most 1000, not 0"),
        (("--json", "/nowhere/plan.json"), "--json: /nowhere/plan.json cannot be written"),
    ],
)
def test_a_wrong_option_is_named(
    tmp_path: Path,
    fleet: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = {"--ttft": "2", "--itl": "0.03", arguments[0]: arguments[1]}
    trace = made(tmp_path, 5, 2.0, 500)
    options = [text for pair in given.items() for text in pair]
    assert planned(monkeypatch, str(trace), "--fleet", str(fleet), *options) == 2
    assert capsys.readouterr().err.startswith(f"tandem plan: {message}")


def test_an_empty_trace_and_a_missing_fleet_are_named(
    tmp_path: Path, fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    goals = ("--ttft", "2", "--itl", "0.03")
    assert planned(monkeypatch, str(empty), "--fleet", str(fleet), *goals) == 2
    assert "empty.jsonl has no requests" in capsys.readouterr().err
    assert planned(monkeypatch, str(empty), *goals) == 2
    assert capsys.readouterr().err.startswith("tandem plan: --fleet: is required with a trace")
    fleet.write_text(json.dumps({**FLEET, "decode": {"count": 0}}))
    assert planned(monkeypatch, str(empty), "--fleet", str(fleet), *goals) == 2
    assert capsys.readouterr().err.startswith("tandem plan: --fleet: decode.count: must be at least 1")
