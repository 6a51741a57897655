"""Conditional disaggregation: which requests aggregated workers serve where pairs serve the model too."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.admission.capacity import Capacity
from tandem_frontend.admission.prefill_backlog import PROMPT_COST_TOKENS, UNMEASURED_PROMPTS_MAX
from tandem_frontend.admission.queue import QueuedRequest
from tandem_frontend.config import FrontendConfig
from tandem_frontend.routing.local_prefill import (
    MAX_TOKENS,
    PATIENCE_S,
    SHARE,
    STREAMS_LEAD,
    WINDOW_S,
    LocalPrefillSettings,
)
from tandem_frontend.routing.policy import PolicyName, RoutingRequest

from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.clock import monotonic
from tandem.domain.placement import Placement
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import ConfigError
from tandem.rpc.convert import placement_text, placement_to_proto
from tests.unit.support.admission import admission_of
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import aggregated, decode, prefill
from tests.unit.support.routing_loads import Loaded

LARGE: dict[str, Any] = {"context_tokens_max": 2**20, "kv_capacity_tokens": 2**20, "running_requests_max": 100}
PREFILL, DECODE, AGGREGATED = prefill(**LARGE), decode(**LARGE), aggregated(**LARGE)
RATE = 1_000
"""Prompt tokens a second of each worker, once measured."""


def fleet(
    *workers: Worker,
    policy: PolicyName = PolicyName.LEAST_WORK,
    rule: LocalPrefillSettings | None = None,
    limit_s: float = math.inf,
) -> Loaded:
    """Idle workers of known load."""
    rule = rule or LocalPrefillSettings()
    made = Loaded(policy, *(workers or (PREFILL, DECODE, AGGREGATED)), rule=rule, limit_s=limit_s)
    made.report_all()
    return made


def measured(*workers: Worker, rule: LocalPrefillSettings | None = None, limit_s: float = math.inf) -> Loaded:
    """The same; each worker that computes prompts has computed one at RATE."""
    made = fleet(*workers, rule=rule, limit_s=limit_s)
    for worker in made.scene.workers:
        work = made.backlog.reserve(RATE - PROMPT_COST_TOKENS)
        work.sent(worker.start)
        finish = leg_pb2.LegFinish()
        finish.timings.prefill_start_time.CopyFrom(Timestamp(seconds=1))
        finish.timings.prefill_end_time.CopyFrom(Timestamp(seconds=2))
        work.computed(finish)
    return made


def streaming(made: Loaded, worker: Worker = AGGREGATED, count: int = 1) -> None:
    """A worker streams, so that prompts delay tokens there."""
    made.report(worker, running=count)


@pytest.mark.parametrize(
    ("tokens", "placement"), [(1, "short_prompt"), (MAX_TOKENS, "short_prompt"), (MAX_TOKENS + 1, "long_prompt")]
)
@pytest.mark.parametrize("policy", [PolicyName.RANDOM, PolicyName.LEAST_WORK, PolicyName.SESSION])
def test_short_prompts_go_to_the_aggregated_worker(policy: PolicyName, tokens: int, placement: str) -> None:
    route = fleet(policy=policy).choose(tokens)
    assert route.placement is Placement(placement)
    assert route.workers == ((AGGREGATED,) if route.placement.is_local else (PREFILL, DECODE))


@pytest.mark.parametrize(("cached", "placement"), [(2_488, "short_prompt"), (2_487, "long_prompt")])
def test_only_the_uncached_part_of_a_prompt_counts(cached: int, placement: str) -> None:
    made = fleet(policy=PolicyName.PREFIX)
    assert made.choose(3_000, {AGGREGATED.start: cached, PREFILL.start: cached}).placement is Placement(placement)


def test_a_prefix_that_only_the_prefill_worker_has_keeps_a_prompt_there() -> None:
    route = fleet(policy=PolicyName.PREFIX).choose(3_000, {PREFILL.start: 2_990})
    assert (route.prefill, route.placement) == (PREFILL, Placement.LONG_PROMPT)


@pytest.mark.parametrize(("waiting", "placement"), [(2_900, "long_prompt"), (3_200, "prefill_wait")])
def test_a_prompt_that_would_wait_longer_than_it_costs_is_local(waiting: int, placement: str) -> None:
    made = measured()
    made.report(PREFILL, waiting_tokens=waiting)
    route = made.choose(3_000)
    assert route.placement is Placement(placement)
    assert route.computing is (AGGREGATED if route.placement.is_local else PREFILL)


def test_what_waits_at_the_aggregated_worker_counts_against_it() -> None:
    made = measured()
    made.report(PREFILL, waiting_tokens=5_000)
    made.report(AGGREGATED, waiting_tokens=2_100)
    assert made.choose(3_000).placement is Placement.LONG_PROMPT


def test_a_prompt_that_is_mostly_cached_is_local_before_any_wait() -> None:
    """The pair would compute 9,000 tokens, the aggregated worker 1,000."""
    made = fleet(policy=PolicyName.PREFIX)
    assert made.choose(9_000, {AGGREGATED.start: 8_000}).placement is Placement.PREFILL_WAIT


@pytest.mark.parametrize("tokens", [10, 3_000])
def test_an_aggregated_worker_of_unknown_load_gets_nothing(tokens: int) -> None:
    made = measured()
    made.report(PREFILL, waiting_tokens=50_000)
    made.costs.note(AGGREGATED.start, None)
    route = made.choose(tokens)
    assert route.computing == PREFILL
    assert route.placement is Placement.LOAD_UNKNOWN


def test_a_prefill_worker_of_unknown_load_is_not_idle() -> None:
    """It is charged with what this frontend has sent there, and as much as the others have."""
    made = measured()
    made.costs.note(PREFILL.start, None)
    for _ in range(5):
        made.send(made.scene.routes.first(RoutingRequest(1_000)), 1_000)
    assert made.choose(1_000).placement is not Placement.LONG_PROMPT


def test_the_share_bounds_the_prompts_of_a_worker_that_streams() -> None:
    made = measured()
    streaming(made)
    sent = 0
    while made.choose(100).placement is Placement.SHORT_PROMPT:
        work, _ = made.send(made.choose(100), 100)
        work.computed()
        sent += 1
    cost_s = (100 + PROMPT_COST_TOKENS) / RATE
    assert sent == int(SHARE * WINDOW_S / cost_s)
    route = made.choose(100)
    assert (route.prefill, route.placement) == (PREFILL, Placement.PROMPT_SHARE)
    made.clock.advance(10 * WINDOW_S)
    assert made.choose(100).placement is Placement.SHORT_PROMPT


def test_a_worker_that_streams_nothing_takes_any_prompt() -> None:
    made = measured(rule=LocalPrefillSettings(max_tokens=100_000, share=0.01))
    assert made.choose(50_000).placement is Placement.SHORT_PROMPT
    streaming(made)
    assert made.choose(50_000).placement is Placement.PROMPT_SHARE


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2_000), st.integers(0, 400)), min_size=1, max_size=120))
def test_the_share_holds_for_any_arrivals(arrivals: list[tuple[int, int]]) -> None:
    """Time given to prompts, over any stretch of time, while prefill workers are free."""
    rule = LocalPrefillSettings(max_tokens=10_000)
    made = measured(rule=rule)
    streaming(made)
    spent: list[tuple[float, float]] = []
    for tokens, pause_ms in arrivals:
        made.clock.advance(pause_ms / 1_000)
        route = made.choose(tokens)
        if route.prefill is None:
            work, request = made.send(route, tokens)
            work.computed()
            request.end()
            spent.append((made.clock(), (tokens + PROMPT_COST_TOKENS) / RATE))
    for begin_s, _ in spent:
        elapsed_s = made.clock() - begin_s
        given_s = sum(cost_s for at_s, cost_s in spent if at_s >= begin_s)
        assert given_s <= SHARE * (elapsed_s + WINDOW_S) + 1e-6


@pytest.mark.parametrize(("wait_s", "placement"), [(PATIENCE_S, "prompt_share"), (4 * PATIENCE_S, "short_prompt")])
def test_the_share_grows_with_the_wait_for_a_prefill_worker(wait_s: float, placement: str) -> None:
    made = measured(rule=LocalPrefillSettings(max_tokens=10_000))
    streaming(made)
    made.report(PREFILL, waiting_tokens=int(wait_s * RATE))
    assert made.choose(1_000).placement is Placement(placement)


def test_prompts_of_other_frontends_count_in_the_share() -> None:
    made = measured()
    computed = 0
    for _ in range(8):
        made.report(AGGREGATED, running=1, computed_tokens=computed)
        made.clock.advance(1)
        computed += int(SHARE * RATE)
    assert made.choose(10).placement is Placement.PROMPT_SHARE
    for _ in range(8):
        made.report(AGGREGATED, running=1, computed_tokens=computed)
        made.clock.advance(1)
    assert made.choose(10).placement is Placement.SHORT_PROMPT


def test_a_frontends_own_prompts_are_not_taken_for_others() -> None:
    made = measured()
    made.report(AGGREGATED, running=1, computed_tokens=0)
    computed = 0
    for _ in range(8):
        work, request = made.send(replace(made.choose(10), prefill=None, decode=AGGREGATED), 200)
        work.computed()
        request.end()
        computed += 200
        made.clock.advance(1)
        made.report(AGGREGATED, running=1, computed_tokens=computed)
    made.clock.advance(10 * WINDOW_S)
    assert made.choose(10).placement is Placement.SHORT_PROMPT


def test_a_draining_worker_that_still_reports_its_load_is_forgotten() -> None:
    made = measured()
    made.report(AGGREGATED, running=1, computed_tokens=0)
    made.scene.workers = (PREFILL, DECODE, replace(AGGREGATED, state=WorkerState.DRAINING))
    assert made.choose(10).decode == DECODE
    made.clock.advance(1)
    made.report(AGGREGATED, running=1, computed_tokens=500)
    made.scene.workers = (PREFILL, DECODE, replace(AGGREGATED, epoch=8))
    assert made.choose(10).placement is Placement.LOAD_UNKNOWN
    made.report(made.scene.workers[-1], computed_tokens=0)
    assert made.choose(10).placement is Placement.SHORT_PROMPT


def test_without_any_rate_a_worker_that_streams_gets_a_few_prompts() -> None:
    made = fleet()
    streaming(made)
    for _ in range(UNMEASURED_PROMPTS_MAX):
        route = made.choose(100)
        assert route.placement is Placement.SHORT_PROMPT
        made.send(route)
    assert made.choose(100).placement is Placement.PROMPT_SHARE


@pytest.mark.parametrize(
    "load",
    [{"running": 100}, {"kv_used_tokens": 2**20 - 10}, {"running": int(100 * STREAMS_LEAD) + 1}],
    ids=["requests", "memory", "more than the decode worker"],
)
def test_an_aggregated_worker_that_streams_too_much_gets_nothing(load: dict[str, int]) -> None:
    made = fleet()
    made.report(AGGREGATED, **load)
    route = made.choose(10)
    assert (route.decode, route.placement) == (DECODE, Placement.STREAMS)


def test_equally_busy_workers_of_both_kinds_take_short_prompts() -> None:
    made = fleet()
    streaming(made, AGGREGATED, 60)
    streaming(made, DECODE, 60)
    assert made.choose(10).placement is Placement.SHORT_PROMPT


@pytest.mark.parametrize("workers", [(PREFILL, DECODE), (AGGREGATED,), (AGGREGATED, aggregated("second", **LARGE))])
def test_the_rule_needs_both_kinds(workers: tuple[Worker, ...]) -> None:
    made = fleet(*workers)
    assert made.choose(10).placement is None
    assert made.choose(10_000).placement is None


@pytest.mark.parametrize("mark", ["unhealthy", "failing", "refused"])
@pytest.mark.parametrize("gone", ["prefill", "decode", "aggregated"])
def test_a_kind_that_is_avoided_is_not_used(gone: str, mark: str) -> None:
    made = fleet()
    workers = {"prefill": PREFILL, "decode": DECODE, "aggregated": AGGREGATED}
    setattr(made.scene, mark, frozenset({workers[gone].start}))
    for tokens in (10, 10_000):
        route = made.choose(tokens)
        assert workers[gone] not in route.workers
        assert route.placement is (Placement.NO_AGGREGATED if gone == "aggregated" else Placement.NO_PAIR)


def test_without_any_prefill_worker_in_the_view_the_aggregated_one_takes_all() -> None:
    made = fleet(DECODE, AGGREGATED)
    streaming(made)
    for tokens in (10, 10_000):
        assert made.choose(tokens).placement is Placement.NO_PAIR


def test_a_continuation_goes_to_the_other_kind() -> None:
    made = fleet()
    there = made.scene.next(600, tried={PREFILL.start, DECODE.start}, refused={PREFILL.start})
    assert there is not None
    assert (there.workers, there.placement) == ((AGGREGATED,), Placement.NO_PAIR)
    back = made.scene.next(10, tried={AGGREGATED.start}, refused={AGGREGATED.start})
    assert back is not None
    assert (back.workers, back.placement) == ((PREFILL, DECODE), Placement.NO_AGGREGATED)


def test_queued_prompts_go_where_an_aggregated_worker_has_time_for_them() -> None:
    made = measured(limit_s=5.0)
    for _ in range(10):
        made.backlog.reserve(1_000).sent(PREFILL.start)
    assert made.backlog.has_room(100)
    assert made.backlog.has_room(4_500), "it would be computed before the prefill worker is near"
    assert not made.backlog.has_room(6_000)
    made.backlog.reserve(100)
    assert made.backlog.has_room(100)
    made.backlog.reserve(9_000)
    assert not made.backlog.has_room(100), "the reserved prompts may take its share"
    made.costs.note(AGGREGATED.start, None)
    assert not made.backlog.has_room(1)


async def test_a_short_prompt_does_not_wait_behind_long_ones_that_need_a_prefill_worker() -> None:
    made = measured(limit_s=5.0)
    headroom = Capacity("m")
    headroom.follow(made.scene.workers)
    controller = admission_of(100, headroom, monotonic, prefill=made.backlog)
    for _ in range(10):
        made.backlog.reserve(1_000).sent(PREFILL.start)
    async with contextlib.AsyncExitStack() as stack:
        long = asyncio.create_task(stack.enter_async_context(controller.slot(prompt_of(6_000))))
        await asyncio.sleep(0)
        assert controller.waiting_count == 1
        work = await asyncio.wait_for(stack.enter_async_context(controller.slot(prompt_of(100))), 1)
        work.sent(AGGREGATED.start)
        assert controller.waiting_count == 1
        assert not long.done()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long


def prompt_of(tokens: int) -> QueuedRequest:
    return QueuedRequest(tokens=tokens + 10, answer_tokens=10, prompt_tokens=tokens)


@pytest.mark.parametrize("name", ["local_prefill_max_tokens", "local_prefill_share"])
def test_settings_of_a_rule_that_is_off_are_refused_by_name(name: str) -> None:
    base: dict[str, Any] = {"registry": "127.0.0.1:1", "model": "models/tandem-demo"}
    with pytest.raises(ConfigError, match=f"{name}: requires local_prefill"):
        FrontendConfig(**base, local_prefill=False, **{name: 1})


def test_every_placement_has_its_number_and_text() -> None:
    numbers = {placement_to_proto(placement) for placement in Placement}
    assert numbers | {placement_to_proto(None)} == set(generation_pb2.Placement.values())
    assert placement_text(placement_to_proto(Placement.SHORT_PROMPT)) == "short prompt"
    assert placement_text(placement_to_proto(None)) == ""
