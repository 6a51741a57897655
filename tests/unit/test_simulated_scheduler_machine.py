"""Page accounting under any interleaving of what the scheduler does: admit, chunk, transfer, abort, evict, retract.

Whatever happens, every page is somewhere; in the end none is held, and every token that came out is the right one.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.domain.generation import FinishReason
from tandem.domain.worker import WorkerRole
from tandem.engine.simulated.kv_pool import KvPool
from tandem.engine.simulated.leg import Leg, Phase
from tandem.engine.simulated.options import Options
from tandem.engine.simulated.scheduler import Scheduler
from tandem.engine.simulated.timing import Ended, Step
from tandem.engine.simulated.tokens import digest
from tandem.errors import EngineFailed
from tests.unit.support.examples import examples
from tests.unit.support.simulated_legs import PAGE, assert_stream_is_right, leg_of

CAPACITY_PAGES = 16
STEPS_MAX = 2_000


class LedgerMachine(RuleBasedStateMachine):
    """One engine's scheduler, with the machine's part taken by the rules."""

    role = WorkerRole.AGGREGATED
    mixed_chunk = False

    def __init__(self) -> None:
        super().__init__()
        caches = self.role is not WorkerRole.DECODE
        self.pool = KvPool(CAPACITY_PAGES * PAGE, PAGE, prefix_cache=caches)
        options = Options(
            page_size_tokens=PAGE,
            chunked_prefill_tokens=2 * PAGE,
            reserved_decode_tokens=PAGE,
            new_token_ratio=0.2,
            mixed_chunk=self.mixed_chunk,
        )
        self.scheduler = Scheduler(self.role, self.pool, options, running_requests_max=4)
        self.legs: list[Leg] = []
        self.step: Step | None = None

    @rule(
        prompt=st.lists(st.integers(3, 4), min_size=1, max_size=40),
        new_tokens=st.integers(1, 24),
        ignore_eos=st.booleans(),
    )
    def arrive(self, prompt: list[int], new_tokens: int, ignore_eos: bool) -> None:
        leg = leg_of(prompt, 1 if self.role is WorkerRole.PREFILL else new_tokens, ignore_eos=ignore_eos)
        self.legs.append(leg)
        if self.role is WorkerRole.DECODE:
            self.scheduler.ask_pages(leg)
        else:
            # A prefill leg hands over because it has a task that does so.
            leg.task = object() if self.role is WorkerRole.PREFILL else None  # type: ignore[assignment]
            self.scheduler.submit(leg)

    @precondition(lambda self: self.step is None)
    @rule()
    def plan(self) -> None:
        for leg in self.scheduler.take_leaving():
            self.scheduler.reap(leg)
        ended = Ended()
        self.step = self.scheduler.plan(ended)
        self._tell(ended)
        if self.step is None:
            self.scheduler.rest()

    @precondition(lambda self: self.step is not None)
    @rule()
    def commit(self) -> None:
        ended = Ended()
        assert self.step is not None
        self.scheduler.commit(self.step, ended)
        self.step = None
        self._tell(ended)

    @rule(place=st.integers(0, 30))
    def abort(self, place: int) -> None:
        """At any moment, in the middle of a step too."""
        alive = [leg for leg in self.legs if not leg.over]
        if alive:
            leg = alive[place % len(alive)]
            leg.report_end(leg.finish(FinishReason.ABORTED))
            self.scheduler.leave(leg)

    @rule(place=st.integers(0, 30))
    def hand_over(self, place: int) -> None:
        moving = [leg for leg in self.legs if leg.phase is Phase.TRANSFERRING and not leg.over]
        if moving:
            leg = moving[place % len(moving)]
            if self.role is WorkerRole.PREFILL:
                leg.kv_went = True
            else:
                leg.kv_came, leg.state = True, digest(leg.request.token_ids)

    @rule()
    def exhaust(self) -> None:
        self.pool.withhold()

    @rule()
    def restore(self) -> None:
        self.pool.restore()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        held = {leg for leg in self.legs if leg.lease is not None}
        assert self.scheduler.legs >= held - self._leaving()
        for leg in self.legs:
            if leg.phase in (Phase.GONE, Phase.RETRACTED, Phase.PREALLOCATING):
                assert leg.lease is None, leg.phase
            elif leg.phase in (Phase.RUNNING, Phase.TRANSFERRING, Phase.PREFILLING):
                assert leg.lease is not None, leg.phase
        assert len(self.scheduler.running) <= 4
        if self.step is None:
            # The last token that came out has no KV yet, and it alone.
            assert all(leg.computed_tokens == leg.sequence_tokens - 1 for leg in self.scheduler.running)

    def teardown(self) -> None:
        self.pool.restore()
        for _ in range(STEPS_MAX):
            if self.step is not None:
                self.commit()
            self.plan()
            for place in range(len(self.legs)):
                self.hand_over(place)
            if self.step is None and all(leg.phase is Phase.GONE for leg in self.legs):
                break
        assert all(leg.phase is Phase.GONE and leg.over for leg in self.legs), "a leg was never reaped"
        self.scheduler.rest()
        account = self.pool.account()
        assert account.free + account.cached == CAPACITY_PAGES
        for leg in self.legs:
            assert_stream_is_right(leg)

    def _tell(self, ended: Ended) -> None:
        for leg in ended.naturally:
            if not leg.over:
                leg.report_end(leg.ended())
        for leg in ended.out_of_memory:
            if not leg.over:
                leg.report_end(EngineFailed("out of KV memory"))

    def _leaving(self) -> set[Leg]:
        return set(self.scheduler._leaving)


class PrefillLedger(LedgerMachine):
    role = WorkerRole.PREFILL


class DecodeLedger(LedgerMachine):
    role = WorkerRole.DECODE


class MixedLedger(LedgerMachine):
    mixed_chunk = True


TestAggregatedLedger = LedgerMachine.TestCase
TestPrefillLedger = PrefillLedger.TestCase
TestDecodeLedger = DecodeLedger.TestCase
TestMixedLedger = MixedLedger.TestCase
BOUNDS = settings(max_examples=examples(40), stateful_step_count=50, deadline=None)
TestAggregatedLedger.settings = BOUNDS
TestPrefillLedger.settings = BOUNDS
TestDecodeLedger.settings = BOUNDS
TestMixedLedger.settings = BOUNDS
