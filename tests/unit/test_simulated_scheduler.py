"""The simulated scheduler's next step: chunks, batches, retraction, and allocation before the KV arrives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.budget import NewTokenRatio
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.scheduler import Scheduler
from tandem.engine.simulated.timing import Ended, Step
from tandem.engine.simulated.tokens import digest
from tandem.errors import EngineFailed
from tests.unit.support.simulated_legs import PAGE, Collected, assert_stream_is_right, leg_of


class Bench:
    """A scheduler and its pool, stepped by hand."""

    def __init__(
        self, pages: int = 64, role: WorkerRole = WorkerRole.AGGREGATED, places: int = 8, **options: Any
    ) -> None:
        defaults = {"page_size_tokens": PAGE, "chunked_prefill_tokens": 4 * PAGE, "reserved_decode_tokens": 0}
        self.pool = KvPool(pages * PAGE, PAGE, prefix_cache=role is not WorkerRole.DECODE)
        self.scheduler = Scheduler(role, self.pool, Options(**{**defaults, **options}), places)
        self.out_of_memory: list[Leg] = []

    def submit(self, *legs: Leg) -> None:
        for leg in legs:
            self.scheduler.submit(leg)

    def step(self) -> Step | None:
        """One step, from plan to commit."""
        ended = Ended()
        step = self.scheduler.plan(ended)
        if step is not None:
            self.scheduler.commit(step, ended)
        for leg in ended.naturally:
            if not leg.over:
                leg.report_end(leg.ended())
        self.out_of_memory += ended.out_of_memory
        self.pool.check()
        return step

    def run(self) -> list[Step]:
        """Steps until nothing is left to do."""
        steps = []
        while (step := self.step()) is not None:
            steps.append(step)
        return steps


def shape(step: Step | None) -> tuple[list[int], int]:
    """Prompt tokens of each chunk, and how many legs decode."""
    assert step is not None
    return [chunk.new_tokens for chunk in step.chunks], len(step.decodes)


def prompt(length: int, first: int = 10) -> range:
    return range(first, first + length)


def test_a_long_prompt_is_computed_in_chunks_and_others_fill_the_last_one() -> None:
    bench = Bench()
    bench.submit(leg_of(prompt(38), 2), leg_of(prompt(5, 100), 2), leg_of(prompt(30, 200), 2))
    assert [shape(bench.step()) for _ in range(4)] == [([16], 0), ([16], 0), ([6, 5], 0), ([16], 0)]


def test_prompts_go_before_tokens() -> None:
    bench = Bench()
    first = leg_of(prompt(8), 4)
    bench.submit(first)
    assert shape(bench.step()) == ([8], 0)
    bench.submit(leg_of(prompt(8, 100), 4))
    assert shape(bench.step()) == ([8], 0)
    assert shape(bench.step()) == ([], 2)
    assert len(first.emitted) == 2


def test_a_mixed_chunk_gives_every_running_leg_a_token() -> None:
    bench = Bench(mixed_chunk=True)
    bench.submit(leg_of(prompt(8), 4))
    bench.step()
    bench.submit(leg_of(prompt(38, 100), 4))
    # The running leg takes one token of the chunk, and chunks end with a page.
    assert shape(bench.step()) == ([12], 1)


def test_a_prompt_whose_beginning_is_cached_costs_only_the_rest() -> None:
    bench = Bench()
    bench.submit(leg_of(prompt(14), 1))
    bench.step()
    again = leg_of([*prompt(14), 5, 6], 1)
    bench.submit(again)
    assert shape(bench.step()) == ([4], 0)
    assert again.cached_tokens == 12


def test_legs_that_run_share_the_pages_of_a_prompt() -> None:
    bench = Bench()
    for _ in range(2):
        bench.submit(leg_of(prompt(13), 4))
        bench.step()
    assert bench.pool.account().lent == 3 + 2


def retracting(role: WorkerRole = WorkerRole.AGGREGATED) -> tuple[Bench, list[Leg]]:
    """Three legs of 8, 4 and 12 prompt tokens on a pool that holds their prompts, but not all they emit."""
    bench = Bench(pages=13, role=role, new_token_ratio=0.01, chunked_prefill_tokens=16 * PAGE)
    legs = [leg_of(prompt(8), 12), leg_of(prompt(4, 100), 12), leg_of(prompt(12, 200), 12)]
    if role is WorkerRole.DECODE:
        for leg in legs:
            bench.scheduler.ask_pages(leg)
        bench.scheduler.plan(Ended())
        arrive(legs)
    else:
        bench.submit(*legs[:2])
        bench.step()
        bench.submit(legs[2])
    return bench, legs


def arrive(legs: Iterable[Leg]) -> None:
    for leg in legs:
        leg.kv_came, leg.state = True, digest(leg.request.token_ids)


def test_the_longest_prompt_is_retracted_and_goes_on_without_a_repeated_token() -> None:
    bench, legs = retracting()
    while not any(leg.retraction_count for leg in legs):
        assert bench.step() is not None
    assert [leg.retraction_count for leg in legs] == [0, 0, 1]
    assert legs[2].phase is Phase.WAITING
    emitted = len(legs[2].emitted)
    steps = bench.run()
    again = [chunk for step in steps for chunk in step.chunks if chunk.leg is legs[2]]
    assert again[0].end_tokens == 12 + emitted, "what it had emitted is computed again"
    for leg in legs:
        assert len(leg.emitted) == 12
        assert_stream_is_right(leg)
    account = bench.pool.account()
    assert account.free + account.cached == 13


def test_a_decode_engine_keeps_the_kv_of_whom_it_retracts() -> None:
    bench, legs = retracting(WorkerRole.DECODE)
    while not any(leg.retraction_count for leg in legs):
        assert bench.step() is not None
    assert bench.scheduler._ratio.value > 0.4, "the belief in few new tokens was not corrected"
    retracted = next(leg for leg in legs if leg.retraction_count)
    emitted, steps = len(retracted.emitted), 0
    while bench.step() is not None:
        steps += retracted in bench.scheduler.running
    assert len(retracted.emitted) - emitted <= steps + 1, "a token came without a step"
    for leg in legs:
        assert leg.over
        assert_stream_is_right(leg)


def test_the_last_leg_without_memory_is_given_up() -> None:
    bench = Bench(pages=4)
    leg = leg_of(prompt(8), 8)
    bench.submit(leg)
    bench.step()
    bench.pool.withhold()
    bench.run()
    assert bench.out_of_memory == [leg]
    assert leg.phase is Phase.GONE
    assert bench.pool.account().withheld == 2


def test_the_belief_in_new_tokens_falls_and_is_corrected() -> None:
    ratio = NewTokenRatio(0.7)
    for _ in range(1_000):
        ratio.decay()
    assert ratio.value == 0.7 * 0.14
    legs = [leg_of(prompt(4), 100) for _ in range(2)]
    ratio.correct(legs)
    assert ratio.value == 40 / 201
    ratio.reset()
    assert ratio.value == 0.7


def test_a_leg_that_ignores_eos_is_expected_to_emit_its_whole_budget() -> None:
    for ignore_eos, admitted in ((False, 2), (True, 1)):
        bench = Bench(pages=12, new_token_ratio=0.1)
        bench.submit(leg_of(prompt(8), 24, ignore_eos=ignore_eos))
        bench.step()
        bench.submit(leg_of(prompt(8, 100), 12))
        bench.step()
        assert len(bench.scheduler.running) == admitted


def test_a_full_batch_admits_no_leg_until_one_leaves() -> None:
    bench = Bench(places=2)
    bench.submit(leg_of(prompt(4), 2), leg_of(prompt(4, 100), 8), leg_of(prompt(4, 200), 1))
    assert shape(bench.step()) == ([4, 4], 0)
    assert shape(bench.step()) == ([], 2)
    assert shape(bench.step()) == ([4], 0)


def test_a_prefill_engine_holds_pages_and_slots_until_the_kv_is_sent() -> None:
    bench = Bench(role=WorkerRole.PREFILL, places=1)
    legs = [leg_of(prompt(8), 1), leg_of(prompt(8, 100), 1)]
    for leg in legs:
        leg.task = object()  # type: ignore[assignment]
    bench.submit(*legs)
    bench.step()
    assert (bench.step(), bench.pool.account().transferring) == (None, 2)
    legs[0].kv_went = True
    assert shape(bench.step()) == ([8], 0)
    assert (legs[0].over, bench.pool.account().cached) == (True, 2)


def test_a_decode_engine_grants_memory_with_a_reserve_for_those_before() -> None:
    bench = Bench(pages=24, role=WorkerRole.DECODE, reserved_decode_tokens=8)
    legs = [leg_of(prompt(16, 100 * place), 4) for place in range(4)]
    for leg in legs:
        bench.scheduler.ask_pages(leg)
    assert bench.step() is None
    # Of 96 tokens, 48 are left for the fourth: it takes 16 and a reserve of 8, besides three reserves of 8.
    assert [leg.pages_granted.is_set() for leg in legs] == [True, True, True, True]
    late = leg_of(prompt(16, 900), 4)
    bench.scheduler.ask_pages(late)
    bench.step()
    assert not late.pages_granted.is_set()
    arrive(legs)
    bench.run()
    assert late.pages_granted.is_set()
    assert [leg.over for leg in legs] == [True] * 4


def test_a_decode_engine_with_a_small_batch_has_three_slots_per_running_request() -> None:
    for places, granted in ((1, 3), (2, 6)):
        bench = Bench(role=WorkerRole.DECODE, places=places)
        legs = [leg_of(prompt(4, 100 * place), 4) for place in range(8)]
        for leg in legs:
            bench.scheduler.ask_pages(leg)
        bench.step()
        assert sum(leg.pages_granted.is_set() for leg in legs) == granted


def test_a_retracted_leg_that_is_alone_needs_no_reserve() -> None:
    bench = Bench(pages=4, role=WorkerRole.DECODE, reserved_decode_tokens=8)
    leg = leg_of(prompt(8), 8)
    leg.computed_tokens = 4 * PAGE
    bench.scheduler.preallocation.retracted.append(leg)
    assert bench.scheduler.preallocation.resume([]) == [leg]


def test_an_ended_leg_leaves_the_batch_after_one_more_step_without_output() -> None:
    bench = Bench()
    leg = leg_of(prompt(4), 8)
    bench.submit(leg)
    bench.step()
    output = leg.output
    assert isinstance(output, Collected)
    said = len(output.token_ids)
    leg.report_end(EngineFailed("no memory"))
    bench.scheduler.leave(leg)
    bench.scheduler.reap(bench.scheduler.take_leaving()[0])
    assert bench.pool.account().lent == 1
    bench.step()
    assert (leg.phase, bench.pool.account().lent) == (Phase.GONE, 0)
    assert (len(output.token_ids), len(output.failures)) == (said, 1)
