"""Times of a hand-over in a stream's finish: each from the leg that can know it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.relay import Relay
from tandem_frontend.response.stop_matching import StopMatcher, StopTokens

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import leg_pb2
from tandem.clock import ManualClock, SteadyTime
from tandem.observability.request_trace import RequestTrace
from tests.unit.support.scripted_legs import Outbox


class Letters:
    """A tokenizer of one letter for each token."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)


def leg(start_s: int | None, end_s: int | None) -> leg_pb2.LegFinish:
    finish = leg_pb2.LegFinish()
    if start_s is not None:
        finish.timings.kv_transfer_start_time.FromSeconds(start_s)
    if end_s is not None:
        finish.timings.kv_transfer_end_time.FromSeconds(end_s)
    return finish


def relay_at(time: SteadyTime) -> Relay:
    trace = RequestTrace(clock=time, begin_s=time.begin_time_s)
    stop_tokens = StopTokens((), (), 0, ignore_eos=True)
    detokenizer = Detokenizer(Letters(), [0])
    return Relay(detokenizer, StopMatcher(()), stop_tokens, trace, Outbox(), Coalescing())


def times(decode: leg_pb2.LegFinish | None, prefill: leg_pb2.LegFinish | None) -> tuple[int, int]:
    finish = relay_at(SteadyTime()).finish(1, decode, prefill, pb.Route())
    timings = finish.timings
    return timings.kv_transfer_start_time.seconds, timings.kv_transfer_end_time.seconds


async def test_a_transfer_starts_when_prefill_writes_and_ends_when_decode_has_it() -> None:
    assert times(leg(100, 140), leg(130, 138)) == (130, 140)


async def test_transfer_times_come_from_one_leg_if_the_other_reports_none() -> None:
    assert times(leg(100, 140), None) == (100, 140)
    assert times(leg(100, 140), leg(None, None)) == (100, 140)
    assert times(None, leg(130, 138)) == (130, 138)


@pytest.mark.parametrize("jump_s", [3_600.0, -3_600.0])
async def test_a_clock_that_is_set_during_a_request_changes_no_order_and_no_duration(jump_s: float) -> None:
    wall, clock = ManualClock(1e9), ManualClock(50.0)
    relay = relay_at(SteadyTime(wall, clock))
    for passed_s in (0.25, 0.5):
        wall.advance(passed_s + jump_s)
        clock.advance(passed_s)
        relay.take([1], ())
    finish = relay.finish(1, None, None, pb.Route())
    timings = finish.timings
    assert timings.time_to_first_token.ToMilliseconds() == 250
    assert timings.accepted_time.ToMilliseconds() == 1e12
    assert timings.first_token_time.ToMilliseconds() == 1e12 + 250
    assert timings.last_token_time.ToMilliseconds() == 1e12 + 750
