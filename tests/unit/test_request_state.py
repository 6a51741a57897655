"""The state machine of a request under every order of events that its two legs can produce."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.domain.request_state import IN_ATTEMPT, ORDER, LegRole, Phase, RequestState
from tests.unit.support.examples import examples

PAIR = (LegRole.PREFILL, LegRole.DECODE)


class RequestMachine(RuleBasedStateMachine):
    """Events of legs in any order that the contract allows."""

    def __init__(self) -> None:
        super().__init__()
        self.state = RequestState()
        self.highest = 0

    def running(self, *, accepted: bool) -> list[LegRole]:
        legs = self.state.legs.values()
        return [leg.role for leg in legs if leg.is_accepted is accepted and not leg.phase.is_last]

    @precondition(lambda self: self.state.phase is Phase.QUEUED)
    @rule(pair=st.booleans())
    def dispatch(self, pair: bool) -> None:
        before = self.state.attempt
        self.state.dispatch(*(PAIR if pair else (LegRole.AGGREGATED,)))
        assert self.state.attempt == before + 1
        self.highest = 0

    @precondition(lambda self: self.running(accepted=False))
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.state.accept(data.draw(st.sampled_from(self.running(accepted=False))))

    @precondition(lambda self: self.running(accepted=True))
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        role = data.draw(st.sampled_from(self.running(accepted=True)))
        self.state.first_token(role)
        if role is not LegRole.PREFILL:
            assert self.state.phase is Phase.DECODING

    @precondition(lambda self: self.running(accepted=True))
    @rule(data=st.data())
    def end_leg(self, data: st.DataObject) -> None:
        self.state.end_leg(data.draw(st.sampled_from(self.running(accepted=True))))

    @precondition(lambda self: self.state.phase in IN_ATTEMPT)
    @rule()
    def requeue(self) -> None:
        self.state.requeue()
        assert not self.state.legs

    @precondition(lambda self: self.state.phase in IN_ATTEMPT)
    @rule()
    def finish(self) -> None:
        self.state.finish()

    @precondition(lambda self: not self.state.phase.is_last)
    @rule()
    def abort(self) -> None:
        self.state.abort()

    @precondition(lambda self: self.state.phase.is_last)
    @rule()
    def another_request(self) -> None:
        self.state = RequestState()

    @invariant()
    def an_attempt_never_goes_back(self) -> None:
        if self.state.phase in IN_ATTEMPT:
            index = ORDER.index(self.state.phase)
            assert index >= self.highest
            self.highest = index

    @invariant()
    def nothing_is_bootstrapping_before_both_legs_are_accepted(self) -> None:
        if self.state.phase is Phase.BOOTSTRAPPING:
            assert all(leg.is_accepted for leg in self.state.legs.values())


RequestMachine.TestCase.settings = settings(max_examples=examples(200), stateful_step_count=30, deadline=None)
TestRequestMachine = RequestMachine.TestCase


def phase_of(state: RequestState) -> Phase:
    """The phase now; a call, so that mypy does not take it for what it was before an event."""
    return state.phase


def test_phases_of_a_pair() -> None:
    state = RequestState()
    state.dispatch(*PAIR)
    assert phase_of(state) is Phase.DISPATCHED
    state.accept(LegRole.DECODE)
    assert phase_of(state) is Phase.DISPATCHED, "one leg is still on its way"
    state.accept(LegRole.PREFILL)
    assert phase_of(state) is Phase.BOOTSTRAPPING
    state.first_token(LegRole.PREFILL)
    assert phase_of(state) is Phase.TRANSFERRING
    state.first_token(LegRole.DECODE)
    assert phase_of(state) is Phase.DECODING
    state.end_leg(LegRole.PREFILL)
    state.end_leg(LegRole.DECODE)
    state.finish()
    assert phase_of(state) is Phase.FINISHED


def test_attempts_are_counted() -> None:
    state = RequestState()
    state.dispatch(*PAIR)
    state.requeue()
    state.dispatch(LegRole.AGGREGATED)
    state.accept(LegRole.AGGREGATED)
    state.first_token(LegRole.AGGREGATED)
    state.requeue()
    state.dispatch(*PAIR)
    assert (state.attempt, state.phase) == (3, Phase.DISPATCHED)


def test_an_aborted_leg_keeps_its_phase() -> None:
    state = RequestState()
    state.dispatch(*PAIR)
    for role in PAIR:
        state.accept(role)
    state.first_token(LegRole.DECODE)
    prefill = state.legs[LegRole.PREFILL]
    prefill.abort()
    prefill.abort()
    assert prefill.phase is Phase.ABORTED
    state.end_leg(LegRole.DECODE)
    assert state.phase is Phase.DECODING
    with pytest.raises(AssertionError):
        state.end_leg(LegRole.PREFILL)
    with pytest.raises(AssertionError):
        state.legs[LegRole.DECODE].abort()


def _ended() -> RequestState:
    state = RequestState()
    state.dispatch(LegRole.AGGREGATED)
    state.finish()
    return state


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: RequestState().accept(LegRole.DECODE),
        lambda: RequestState().finish(),
        lambda: RequestState().requeue(),
        lambda: RequestState().dispatch(LegRole.DECODE),
        lambda: _ended().abort(),
        lambda: _ended().dispatch(*PAIR),
        lambda: _ended().first_token(LegRole.AGGREGATED),
    ],
)
def test_an_impossible_transition_is_an_assertion(impossible: object) -> None:
    assert callable(impossible)
    with pytest.raises(AssertionError):
        impossible()
