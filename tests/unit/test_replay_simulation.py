"""Whole replays: the same result each time, every request once, and what admission refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.replay.fleet_file import FleetFile, faster, parse_fleet
from tandem_frontend.replay.frontend import FINISHED
from tandem_frontend.replay.routing import POLICIES
from tandem_frontend.replay.simulation import Replay, replay, utilisation_of
from tandem_frontend.replay.summary import Spread, rows_of, summary_of
from tandem_frontend.replay.trace import ChainHashes, TracedRequest, read_trace
from tandem_frontend.routing.worker_costs import WorkerCosts

from benchmarks.replay.made_traces import conversations, single_turn, write

PAIRS: dict[str, Any] = {
    "prefill": {"count": 3, "cache_blocks": 120},
    "decode": {"count": 2, "kv_capacity_tokens": 200_000, "running_requests_max": 8},
    "engine": {"prefill_tokens_per_s": 9_000, "decode_step_s": 0.01, "jitter": 0.05},
}
SHAPES: dict[str, dict[str, Any]] = {
    "pairs": PAIRS,
    "three frontends": {**PAIRS, "frontend": {"count": 3}},
    "aggregated": {"aggregated": {"count": 3, "cache_blocks": 200}, "engine": PAIRS["engine"]},
    "both": {**PAIRS, "aggregated": {"count": 1, "cache_blocks": 200}},
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[TracedRequest]:
    return read_trace(write(conversations(60, seed=4), tmp_path_factory.mktemp("trace") / "made.jsonl"), 512)


def run(fleet: FleetFile, trace: list[TracedRequest], policy: str = "random", seed: int = 0) -> Replay:
    return replay(fleet, fleet.options(), trace, policy, seed)


@pytest.mark.parametrize("policy", ["random", "prefix", "oracle"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_ends_once_with_its_tokens(trace: list[TracedRequest], shape: str, policy: str) -> None:
    fleet = parse_fleet(SHAPES[shape])
    outcome = run(fleet, trace, policy)
    assert [one.number for one in outcome.served] == list(range(len(trace)))
    for request, one in zip(trace, outcome.served, strict=True):
        assert one.outcome == FINISHED
        assert (one.prompt_tokens, one.answer_tokens) == (request.prompt_tokens, request.answer_tokens)
        assert one.arrival_s == pytest.approx(request.arrival_s)
        assert 0 <= one.queue_s < one.ttft_s <= one.end_s - one.arrival_s
        assert 0 <= one.cached_tokens < one.prompt_tokens
    summary = summary_of(outcome)
    assert sum(worker.prompt_tokens for worker in summary.workers) == sum(one.prompt_tokens for one in trace)
    assert sum(worker.answer_tokens for worker in summary.workers) == sum(one.answer_tokens for one in trace)
    assert sum(worker.cached_tokens for worker in summary.workers) == sum(one.cached_tokens for one in outcome.served)
    for engine in outcome.engines:
        engine.prompts.pool.check()
        account = engine.prompts.pool.account()
        assert account.lent == account.transferring == engine.memory.used_tokens == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_result(trace: list[TracedRequest], policy: str) -> None:
    fleet = parse_fleet(SHAPES["three frontends"])
    one, same, other = (run(fleet, trace, policy, seed) for seed in (1, 1, 2))
    assert rows_of(one.served) == rows_of(same.served)
    assert summary_of(one) == summary_of(same)
    assert rows_of(one.served) != rows_of(other.served)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_machines_clock_moves_nothing(
    trace: list[TracedRequest], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy weighs how long work is in hand, which must be virtual time too."""

    def forbidden() -> float:
        raise AssertionError("a replay has read the machine's clock")

    monkeypatch.setattr(WorkerCosts.__init__, "__defaults__", (forbidden,))
    assert run(parse_fleet(SHAPES[shape]), trace, "auto").served


def test_an_oracle_is_faster_and_finds_more_in_caches(trace: list[TracedRequest]) -> None:
    blind, oracle = (summary_of(run(parse_fleet(PAIRS), trace, policy)) for policy in ("random", "oracle"))
    assert oracle.ttft_s.mean < blind.ttft_s.mean
    assert oracle.hit_rate > blind.hit_rate


def test_prefix_finds_all_that_is_cached_where_nothing_else_is_going_on(trace: list[TracedRequest]) -> None:
    """One request at a time, caches without a limit: every prompt finds each full block that was ever computed."""
    fleet = parse_fleet({**PAIRS, "prefill": {"count": 3}, "frontend": {"count": 2}})
    alone = [replace(request, arrival_s=100.0 * request.number) for request in trace]
    outcome = run(fleet, alone, "prefix")
    seen, chains = set[int](), ChainHashes()
    for request, one in zip(alone, outcome.served, strict=True):
        hashes = chains.of(request.block_ids[: request.prompt_tokens // 512])
        shareable = hashes[: (request.prompt_tokens - 1) // 512]
        ideal = next((at for at, block in enumerate(shareable) if block not in seen), len(shareable))
        assert one.cached_tokens == one.expected_cached_tokens
        # The worker that computed the last turn has them all, unless the floor of its share sent this one elsewhere.
        assert one.cached_tokens <= 512 * ideal
        seen.update(hashes)
    assert summary_of(outcome).hit_rate > 0.5


def test_frontends_know_of_each_others_prompts_when_they_come() -> None:
    """Load reports of the interval come once in a minute here: all that is known comes with the changes."""
    prompts = [TracedRequest(n, 1 + n / 4, 4_000, 2, tuple(range(100 * n, 100 * n + 8))) for n in range(40)]
    slowest_s = []
    for change_interval_s in (0.02, 0.0):
        frontends = {"count": 4, "load_interval_s": 60, "change_interval_s": change_interval_s}
        engine = {"prefill_tokens_per_s": 4_000}
        fleet = {"prefill": {"count": 4}, "decode": {"count": 1}, "engine": engine, "frontend": frontends}
        outcome = run(parse_fleet(fleet), prompts, "least_work")
        slowest_s.append(max(one.ttft_s for one in outcome.served))
    assert slowest_s[0] < 2.6, "a prompt takes 1 s, and waits for part of one"
    assert slowest_s[1] > 3.0


def test_a_request_that_no_worker_can_hold_is_counted_as_refused(trace: list[TracedRequest]) -> None:
    long = TracedRequest(len(trace), trace[-1].arrival_s, 120 * 512, 1, tuple(range(120)))
    summary = summary_of(run(parse_fleet(PAIRS), [*trace, long]))
    assert summary.outcomes == {"CONTEXT_LENGTH_EXCEEDED": 1}
    assert (summary.finished, summary.requests) == (len(trace), len(trace) + 1)


def test_the_frontends_own_limit_rejects(trace: list[TracedRequest]) -> None:
    summary = summary_of(run(parse_fleet({**PAIRS, "frontend": {"open_requests_max": 1}}), trace))
    assert summary.outcomes["OVERLOADED"] > 0
    assert summary.finished + summary.outcomes["OVERLOADED"] == len(trace)


def test_prompts_beyond_the_prefill_queue_wait_in_the_frontend(trace: list[TracedRequest]) -> None:
    fleet = parse_fleet({**PAIRS, "frontend": {"prefill_queue_s": 0.05}})
    burst = [TracedRequest(one.number, 0.0, one.prompt_tokens, 1, one.block_ids) for one in trace]
    outcome = run(fleet, burst)
    assert summary_of(outcome).queue_s.mean > 1.0
    assert max(worker.waiting_peak for worker in summary_of(outcome).workers) < len(trace) / 4


def test_utilisation_is_that_of_prompts_without_a_cache(tmp_path: Path) -> None:
    requests = read_trace(write(single_turn(800, seed=2), tmp_path / "single.jsonl"), 512)
    fleet = parse_fleet({"prefill": {"count": 4}, "decode": {"count": 1}, "engine": {"prefill_pair_s": 1e-12}})
    options = fleet.options()
    options = faster(options, utilisation_of(options, requests, 4) / 0.6)
    assert utilisation_of(options, requests, 4) == pytest.approx(0.6)
    summary = summary_of(replay(fleet, options, requests, "random", 0))
    assert summary.hit_rate == 0
    busy_s = summary.prefill_utilisation * summary.duration_s
    assert busy_s == pytest.approx(0.6 * requests[-1].arrival_s, rel=0.02)


def test_progress_is_reported_and_may_end_the_replay(trace: list[TracedRequest]) -> None:
    counts: list[int] = []
    fleet = parse_fleet(PAIRS)
    replay(fleet, fleet.options(), trace, "random", 0, counts.append)
    assert counts[-1] == len(trace)
    assert counts == sorted(counts)


def test_quantiles_are_values_that_occurred() -> None:
    assert Spread.of([float(value) for value in range(100, 0, -1)]) == Spread(50.5, 50.0, 90.0, 99.0)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)
    assert Spread.of([]) == Spread(0.0, 0.0, 0.0, 0.0)
