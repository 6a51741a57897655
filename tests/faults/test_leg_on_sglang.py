"""Workers of the real engine that die, stand still, come back and drain: in every phase of a leg, token for token.

Two prefill and two decode engines, started once. At each fault the victim has a stream in every phase, held there by
`sglang_holds`; the tests stand in an order, because a dead prefill worker leaves pages behind for half a minute.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tandem.api.types.v1 import leg_pb2
from tandem.client import calls
from tandem.errors import StaleEpoch
from tandem.testing.direct_legs import direct_legs
from tandem.testing.eventually import assert_eventually
from tests.faults.support.history import History, now_s
from tests.faults.support.leg_cluster import BUSY_MACHINE_S, IDLE_WITHIN_S
from tests.faults.support.leg_report import LINES, report, results_of
from tests.faults.support.leg_trace import detected_s
from tests.faults.support.process_faults import frozen, kill
from tests.faults.support.sglang_legs import (
    IN_TURN,
    ON_SGLANG,
    SglangFleet,
    Stream,
    all_frozen,
    ended,
    prompt_of,
    scheduler_of,
    sglang_fleet,
)

pytestmark = ON_SGLANG

Answers = dict[tuple[int, ...], list[int]]
AFTER_A_KILL_S, AFTER_A_STOP_S = 0.5, 2.0
"""Until the first of the legs that broke is sent elsewhere."""
PREFILL_S = 60.0
"""Until the next token after that: no promise. One engine computes all that broke, on cores that others want too."""
DEATHS: dict[str, float] = {}
RELEASE_S = 30.0
"""SGLang holds the pages of a hand-over for so long when no peer can say that prefill writes no more."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SglangFleet]:
    async with sglang_fleet(tmp_path_factory.mktemp("legs-on-sglang"), prefill=2, decode=2) as fleet:
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def answers(fleet: SglangFleet) -> Answers:
    """What the engines answer to each prompt when nothing breaks."""
    found = await fleet.answers(prompt_of(phase, number) for phase in IN_TURN for number in range(2))
    assert len({tuple(tokens) for tokens in found.values()}) == len(found), "they do not depend on the prompt"
    await fleet.assert_no_pages(IDLE_WITHIN_S + BUSY_MACHINE_S)
    return found


async def assert_exact(fleet: SglangFleet, streams: list[Stream], answers: Answers) -> None:
    """One ending each, and no token that the undisturbed run has not."""
    missing = {s.asked.prompt for s in streams} - set(answers)
    answers |= await fleet.answers(missing)
    for stream in streams:
        asked = stream.asked
        assert asked.failure is None, fleet.summary(stream)
        assert (asked.finish_count, asked.misplaced_count) == (1, 0), fleet.summary(stream)
        assert asked.tokens == answers[asked.prompt], fleet.summary(stream)


def assert_went_on(fleet: SglangFleet, streams: list[Stream], fault_s: float, within_s: float) -> None:
    """All of them lost their worker, which was noticed in time, and had their next token."""
    detected = detected_s(fleet, fault_s)
    assert detected is not None, "void: no leg was sent elsewhere"
    assert detected < within_s + BUSY_MACHINE_S, f"the first leg was sent elsewhere after {detected:.2f} s"
    for asked in (stream.asked for stream in streams):
        assert asked.went_on, f"void: it lost nothing: {asked.summary()}"
        assert (asked.gap_after_s(fault_s) or 0.0) < PREFILL_S, f"{asked.gap_after_s(fault_s)} s: {asked.summary()}"


def report_streams(fleet: SglangFleet, scenario: str, streams: list[Stream], fault_s: float) -> None:
    results = results_of(History(stream.asked for stream in streams), fault_s, detected_s(fleet, fault_s))
    report(f"SGLang: {scenario}", results)


@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
async def test_a_stopped_worker_loses_no_token(fleet: SglangFleet, answers: Answers, victim: str) -> None:
    streams = await fleet.in_every_phase(victim)
    async with all_frozen(fleet.processes[victim]) as fault_s:
        had = fleet.held_by(streams, victim, fault_s)
        # The victim's own hold goes with it: what it does after the fault must not depend on it.
        fleet.holds.end(*(worker.name for worker in fleet.workers if worker.name != victim))
        await ended(streams)
    fleet.holds.end()
    over_s = now_s()
    stays = had.pop("decoding") if victim.startswith("prefill") else []
    assert not any(s.asked.went_on for s in stays), "its KV had been handed over"
    assert_went_on(fleet, [s for found in had.values() for s in found], fault_s, AFTER_A_STOP_S)
    # Both sides can speak again, so neither has to wait for the end of a time.
    await fleet.assert_no_legs(IDLE_WITHIN_S + BUSY_MACHINE_S)
    await fleet.assert_no_pages(IDLE_WITHIN_S + BUSY_MACHINE_S)
    LINES.append(
        f"SGLang: pages of both sides were free {now_s() - over_s:.1f} s after the end of the stop of {victim}"
    )
    await _whole(fleet)
    await assert_exact(fleet, streams, answers)
    report_streams(fleet, f"stop of {victim}", streams, fault_s)


async def _whole(fleet: SglangFleet) -> None:
    async with fleet.views() as views:
        await fleet.whole(views)


async def test_a_scheduler_that_stands_still_loses_its_streams_and_not_its_worker(
    fleet: SglangFleet, answers: Answers
) -> None:
    streams = await fleet.in_every_phase("decode-0")
    victim = fleet.processes["decode-0"]
    async with frozen(scheduler_of(victim)) as fault_s:
        had = fleet.held_by(streams, "decode-0", fault_s)
        fleet.holds.end(*(worker.name for worker in fleet.workers if worker is not victim))
        await assert_eventually(lambda: _serves(victim.address), lambda serves: not serves, what="NOT_SERVING")
        await ended(streams)
    fleet.holds.end()
    assert_went_on(fleet, [s for found in had.values() for s in found], fault_s, AFTER_A_STOP_S)
    await assert_eventually(lambda: _serves(victim.address), within_s=60, what="SERVING after a canary")
    await fleet.assert_no_pages(IDLE_WITHIN_S + BUSY_MACHINE_S)
    await assert_exact(fleet, streams, answers)
    report_streams(fleet, "stop of a decode scheduler", streams, fault_s)


async def _serves(address: str) -> bool:
    return await calls.is_serving(address)


async def test_a_killed_prefill_worker_loses_no_token(fleet: SglangFleet, answers: Answers) -> None:
    streams = await fleet.in_every_phase("prefill-0")
    had = fleet.held_by(streams, "prefill-0", now_s())
    DEATHS["prefill-0"] = fault_s = await kill(fleet.processes["prefill-0"])
    fleet.holds.end()
    await ended(streams)
    assert not any(s.asked.went_on for s in had["decoding"]), "its KV had been handed over"
    lost = [s for phase in ("bootstrapping", "prefilling", "transferring") for s in had[phase]]
    assert_went_on(fleet, lost, fault_s, AFTER_A_KILL_S)
    await fleet.assert_no_legs(IDLE_WITHIN_S + BUSY_MACHINE_S)
    if now_s() - fault_s < RELEASE_S:
        # What a dead prefill engine has still written is unknown. The results say which requests wait for that.
        await _assert_held_for_the_dead(fleet, had["transferring"] + had["prefilling"], had["bootstrapping"])
    await assert_exact(fleet, streams, answers)
    report_streams(fleet, "kill of a prefill worker", streams, fault_s)


async def _assert_held_for_the_dead(fleet: SglangFleet, begun: list[Stream], perhaps: list[Stream]) -> None:
    """`perhaps`: decode may have given them their pages between the end of their hold and the abort, or not."""
    loads = await fleet.loads()
    held = {name: load.kv_transferring_tokens for name, load in loads.items()}
    least = sum(len(stream.asked.prompt) for stream in begun)
    assert sum(held.values()) in (least, least + sum(len(stream.asked.prompt) for stream in perhaps)), held
    assert held == {name: load.kv_used_tokens for name, load in loads.items()}


async def test_a_killed_decode_worker_loses_no_token(fleet: SglangFleet, answers: Answers) -> None:
    streams = await fleet.in_every_phase("decode-0")
    had = fleet.held_by(streams, "decode-0", now_s())
    fault_s = await kill(fleet.processes["decode-0"])
    fleet.holds.end()
    await ended(streams)
    assert_went_on(fleet, [s for found in had.values() for s in found], fault_s, AFTER_A_KILL_S)
    await fleet.assert_no_legs(IDLE_WITHIN_S + BUSY_MACHINE_S)
    await assert_exact(fleet, streams, answers)
    report_streams(fleet, "kill of a decode worker", streams, fault_s)


async def test_workers_that_come_back_at_their_addresses_are_used_and_their_old_starts_refused(
    fleet: SglangFleet, answers: Answers
) -> None:
    async with fleet.asking(answers) as asked:
        await fleet.restart("prefill-0", "decode-0")
        await assert_eventually(
            lambda: {worker for stream in asked for worker in stream.asked.workers if stream.asked.finish_count},
            {"prefill-0", "decode-0"}.issubset,
            within_s=60,
            what="answers by the new starts",
        )
    assert not len(failed := History(s.asked for s in asked).failed()), failed.lines()
    await _assert_stale(fleet, "decode-0")
    await fleet.assert_no_pages(max(0.0, DEATHS["prefill-0"] + RELEASE_S - now_s()) + BUSY_MACHINE_S)
    await assert_exact(fleet, asked, answers)
    LINES.append(f"SGLang: {len(asked)} requests while two workers came back, none failed")


async def _assert_stale(fleet: SglangFleet, name: str) -> None:
    """A call that means an earlier start is refused."""
    async with direct_legs(fleet.processes[name].address) as legs:
        worker = legs.worker
        leg = leg_pb2.LegRequest(
            request_id="of-the-old-start",
            attempt=1,
            worker_epoch=worker.epoch - 1,
            model=worker.capabilities.model,
            token_ids=[1],
            bootstrap=leg_pb2.Bootstrap(host="127.0.0.1", port=1, room=1),
        )
        with pytest.raises(StaleEpoch):
            await legs.start(leg)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_worker_that_drains_finishes_everything_it_has(
    fleet: SglangFleet, answers: Answers, victim: str
) -> None:
    streams = await fleet.in_every_phase(victim)
    leaving, fault_s = fleet.processes[victim], now_s()
    fleet.held_by(streams, victim, fault_s)
    leaving.signal(signal.SIGTERM)
    await assert_eventually(lambda: _serves(leaving.address), lambda serves: not serves, what="NOT_SERVING")
    later = [fleet.begin(prompt_of("decoding", number)) for number in range(4)]
    fleet.holds.end()
    assert await leaving.wait_ended() == 0
    await ended([*streams, *later])
    assert not any(stream.asked.went_on for stream in (*streams, *later)), "a drain broke a stream"
    await fleet.assert_no_pages(IDLE_WITHIN_S + BUSY_MACHINE_S)
    await assert_exact(fleet, [*streams, *later], answers)
    report_streams(fleet, f"drain of {victim}", streams, fault_s)
