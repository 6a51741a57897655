"""The prefill backlog: what may wait in prefill workers, learnt from what they computed."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from tandem_frontend.admission.prefill_backlog import PROMPT_COST_TOKENS, UNMEASURED_PROMPTS_MAX, PrefillBacklog

from tandem.api.types.v1 import leg_pb2
from tandem.domain.worker import EngineLoad, UnfinishedPrompts, Worker
from tests.unit.support.frontend_workers import aggregated, decode, prefill

PROMPT = 1_000 - PROMPT_COST_TOKENS
"""With its own cost a thousand tokens."""


def backlog(*workers: Worker, limit_s: float = 5.0) -> PrefillBacklog:
    made = PrefillBacklog(prefill().capabilities.model, limit_s)
    made.follow(workers)
    return made


def finish(start_s: float, end_s: float) -> leg_pb2.LegFinish:
    made = leg_pb2.LegFinish()
    for name, time_s in (("prefill_start_time", start_s), ("prefill_end_time", end_s)):
        getattr(made.timings, name).CopyFrom(Timestamp(seconds=int(time_s), nanos=int(time_s % 1 * 1e9)))
    return made


def measured(*workers: Worker, seconds: float = 1.0) -> PrefillBacklog:
    """A backlog whose first worker took `seconds` for a thousand tokens."""
    made = backlog(*workers)
    work = made.reserve(PROMPT)
    work.sent(workers[0].start)
    work.computed(finish(100.0, 100.0 + seconds))
    return made


def admitted(made: PrefillBacklog, worker: Worker | None, count: int = 50) -> int:
    """How many prompts get room, each sent to `worker` at once if there is one."""
    for number in range(count):
        if not made.has_room():
            return number
        work = made.reserve(PROMPT)
        if worker is not None:
            work.sent(worker.start)
    return count


def test_a_worker_without_a_measurement_gets_a_few_prompts() -> None:
    worker = prefill()
    assert admitted(backlog(worker), worker) == UNMEASURED_PROMPTS_MAX


def test_backlog_of_an_engine_without_times_is_not_limited() -> None:
    worker = prefill()
    for times in (leg_pb2.LegFinish(), finish(100.0, 100.0)):
        made = backlog(worker)
        work = made.reserve(PROMPT)
        work.sent(worker.start)
        work.computed(times)
        assert admitted(made, worker) == 50


def test_backlog_forgets_the_prompts_of_a_worker_that_left() -> None:
    worker, other = prefill("p1"), prefill("p2")
    made = backlog(worker, other)
    works = [made.reserve(PROMPT) for _ in range(4)]
    for work in works:
        work.sent(worker.start)
    made.follow([other])
    assert made._own_count == 0
    for work in works:
        work.drop()
    assert made._own_count == 0


def test_a_worker_gets_as_many_seconds_of_work_as_the_limit() -> None:
    worker = prefill()
    assert admitted(measured(worker), worker) == 5
    assert admitted(measured(worker, seconds=0.5), worker) == 10


def test_reserved_prompts_count_before_they_are_sent() -> None:
    assert admitted(measured(prefill()), None) == 5


def test_a_frontend_without_a_prompt_at_work_always_has_room() -> None:
    worker = prefill()
    made = measured(worker, seconds=1_000.0)
    assert admitted(made, worker) == 1


def test_a_computed_prompt_makes_room_and_reports_it() -> None:
    worker, changes = prefill(), list[None]()
    made = measured(worker)
    works = [made.reserve(PROMPT, lambda: changes.append(None)) for _ in range(5)]
    for work in works:
        work.sent(worker.start)
    assert not made.has_room()
    assert not changes
    works[0].computed()
    assert made.has_room()
    assert len(changes) == 1
    works[0].drop()
    assert len(changes) == 1, "once"


def test_prompts_computed_together_are_measured_as_one_busy_time() -> None:
    worker = prefill()
    made = backlog(worker)
    works = [made.reserve(PROMPT) for _ in range(4)]
    for work in works:
        work.sent(worker.start)
    for work in works:
        work.computed(finish(10.0, 11.0))
    assert admitted(made, worker) == 20


def test_a_prompt_whose_first_token_came_first_is_measured_by_its_finish() -> None:
    worker = prefill()
    made = backlog(worker)
    work = made.reserve(PROMPT)
    work.sent(worker.start)
    work.computed()
    work.computed(finish(10.0, 11.0))
    assert admitted(made, worker) == 5


def test_a_retried_prompt_counts_at_its_new_worker_only() -> None:
    first, second = prefill("a"), prefill("b")
    made = measured(first, second)
    work = made.reserve(PROMPT)
    work.sent(first.start)
    work.sent(second.start)
    assert admitted(made, first, 5) == 5
    work.drop()


def test_the_work_of_other_frontends_counts_as_reported() -> None:
    worker = prefill()
    made = measured(worker)
    made.note(worker.start, EngineLoad(waiting_tokens=4 * PROMPT, waiting_requests=4))
    # 4 s of others: 1 s is left, and a quarter more than the limit because this frontend has less than they.
    assert admitted(made, worker) == 3


def test_a_report_of_an_empty_queue_is_believed() -> None:
    """Legs that wait for decode's memory are at prefill, but keep no other prompt from being computed."""
    worker = prefill()
    made = measured(worker)
    assert admitted(made, worker) == 5
    made.note(worker.start, EngineLoad(waiting_tokens=0, waiting_requests=0))
    assert admitted(made, worker) == 5


def test_what_a_worker_counts_is_work_and_leaves_the_limit_to_what_waits() -> None:
    """Prompts that wait for decode's memory are unfinished, but keep no other one from being computed."""
    worker = prefill()
    made = measured(worker)
    made.reserve(PROMPT).sent(worker.start)
    unfinished = UnfinishedPrompts(4, 4 * PROMPT)
    made.note(worker.start, EngineLoad(waiting_tokens=0, waiting_requests=0, unfinished=unfinished))
    known = made.get(worker.start)
    assert known is not None
    assert (known.work, known.others_unfinished, known.others_count) == (4_000, 3_000, 3)
    assert admitted(made, worker) == 5
    made.note(worker.start, EngineLoad(waiting_tokens=0, waiting_requests=0))
    assert (known.others_unfinished, known.others_count) == (None, 0), "another release of the worker"


def test_finished_prompts_are_taken_off_a_report() -> None:
    worker = prefill()
    made = measured(worker)
    works = [made.reserve(PROMPT) for _ in range(5)]
    for work in works:
        work.sent(worker.start)
    made.note(worker.start, EngineLoad(waiting_tokens=5 * PROMPT, waiting_requests=5))
    assert not made.has_room()
    works[0].drop()
    assert admitted(made, worker) == 1


def test_aggregated_workers_need_no_prefill_worker() -> None:
    both = prefill(), aggregated()
    assert admitted(measured(*both), both[0]) == 50
    assert admitted(backlog(decode()), None) == 50


def test_a_worker_that_left_no_longer_counts() -> None:
    worker = prefill()
    made = measured(worker)
    work = made.reserve(PROMPT)
    work.sent(worker.start)
    made.follow(())
    assert admitted(made, None) == 50
    work.drop()
