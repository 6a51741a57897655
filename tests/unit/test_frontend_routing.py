"""Routing: possible routes, preferred routes, and the errors where there is none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.router import AVOIDED_S, RecentRefusals

from tandem.clock import ManualClock
from tandem.domain.worker import LEG_CONTRACT, PAIR_FIELDS, Worker, WorkerState
from tandem.errors import ContextExceeded, IncompatibleWorkers, NoWorkers
from tests.unit.support.frontend_workers import aggregated, decode, prefill
from tests.unit.support.routing_scene import ByIndex, Scene


def chosen(scene: Scene, prompt_tokens: int = 1, times: int = 60) -> set[tuple[str, str | None]]:
    """Ids of all routes selected in `times` calls."""
    return {_ids(scene.first(prompt_tokens)) for _ in range(times)}


def _ids(route: Route) -> tuple[str, str | None]:
    return route.decode.worker_id, route.prefill.worker_id if route.prefill else None


def test_pairs_and_aggregated_workers_serve() -> None:
    scene = Scene(prefill(), decode(), aggregated())
    assert chosen(scene) == {("decode-0", "prefill-0"), ("aggregated-0", None)}


@pytest.mark.parametrize(
    ("workers", "role"),
    [((), "any"), ((prefill(),), "decode"), ((decode(),), "prefill")],
    ids=["none", "prefill only", "decode only"],
)
def test_a_missing_role_is_named(workers: tuple[Worker, ...], role: str) -> None:
    with pytest.raises(NoWorkers) as refused:
        Scene(*workers).first()
    assert refused.value.metadata["role"] == role
    assert refused.value.retry_delay_s is not None


def test_workers_that_drain_or_serve_another_model_do_not_count() -> None:
    scene = Scene(replace(aggregated(), state=WorkerState.DRAINING), aggregated("other", model="other"))
    with pytest.raises(NoWorkers):
        scene.first()


def test_a_worker_that_drains_gets_no_request() -> None:
    scene = Scene(prefill(), decode(), decode("decode-1"))
    assert {stream for stream, _ in chosen(scene)} == {"decode-0", "decode-1"}
    scene.workers = (prefill(), replace(decode(), state=WorkerState.DRAINING), decode("decode-1"))
    assert {stream for stream, _ in chosen(scene)} == {"decode-1"}
    scene.workers = scene.workers[:2]
    with pytest.raises(NoWorkers, match="no decode worker"):
        scene.first()


OTHER: dict[str, Any] = {"tensor_parallel_size": 2, "page_size_tokens": 64}


CHECKED_BEFORE = ("model", "tokenizer_digest")


@pytest.mark.parametrize("field", [*(f for f in PAIR_FIELDS if f not in CHECKED_BEFORE), "tensor_parallel_size"])
def test_the_differing_field_is_named(field: str) -> None:
    with pytest.raises(IncompatibleWorkers) as refused:
        Scene(prefill(), decode(**{field: OTHER.get(field, "other")})).first()
    assert refused.value.metadata == {"field": field, "prefill": "prefill-0", "decode": "decode-0"}
    assert field in str(refused.value)


def test_a_tokenizer_that_is_not_the_frontends_is_named() -> None:
    with pytest.raises(IncompatibleWorkers) as refused:
        Scene(prefill(tokenizer_digest="c" * 64), decode(tokenizer_digest="c" * 64)).first()
    assert refused.value.metadata["field"] == "tokenizer_digest"


def test_one_bad_pair_does_not_hide_a_good_one() -> None:
    scene = Scene(prefill(), decode("decode-1", page_size_tokens=64), decode())
    assert chosen(scene) == {("decode-0", "prefill-0")}


@pytest.mark.parametrize("old", [aggregated, prefill, decode])
def test_a_worker_of_another_leg_contract_is_named_with_both_versions(old: object) -> None:
    workers = [aggregated()] if old is aggregated else [prefill(), decode()]
    changed = [replace(w, leg_contract=1) if w.role.value == old.__name__ else w for w in workers]  # type: ignore[attr-defined]
    with pytest.raises(
        IncompatibleWorkers, match=rf"-0 has leg contract 1, this frontend needs {LEG_CONTRACT}"
    ) as refused:
        Scene(*changed).first()
    assert refused.value.metadata == {"field": "leg_contract", "worker": f"{old.__name__}-0"}  # type: ignore[attr-defined]


def test_workers_of_another_leg_contract_are_never_selected() -> None:
    scene = Scene(
        prefill(), decode(), replace(decode("decode-1"), leg_contract=1), replace(aggregated(), leg_contract=3)
    )
    assert chosen(scene) == {("decode-0", "prefill-0")}
    assert scene.first().pick.candidates_count == 1


def test_a_prompt_goes_to_workers_whose_context_holds_it() -> None:
    scene = Scene(
        prefill(context_tokens_max=128), prefill("prefill-1", context_tokens_max=32),
        decode(context_tokens_max=64), decode("decode-1", context_tokens_max=128),
    )  # fmt: skip
    everything = {(d, p) for d in ("decode-0", "decode-1") for p in ("prefill-0", "prefill-1")}
    assert chosen(scene, 31) == everything
    assert chosen(scene, 63) == {("decode-0", "prefill-0"), ("decode-1", "prefill-0")}
    assert chosen(scene, 64) == chosen(scene, 127) == {("decode-1", "prefill-0")}
    with pytest.raises(ContextExceeded) as refused:
        scene.first(128)
    assert refused.value.metadata == {"field": "token_ids", "limit": "128"}
    assert scene.next(128, (), ()) is None
    small = Scene(prefill(context_tokens_max=32), decode(context_tokens_max=128))
    with pytest.raises(ContextExceeded, match="the 32 tokens that"):
        small.first(32)


def test_mla_lets_tensor_parallelism_differ() -> None:
    assert chosen(Scene(prefill(is_mla=True), decode(is_mla=True, tensor_parallel_size=2)))


def test_choice_is_even_over_those_that_stream() -> None:
    scene = Scene(prefill(), prefill("prefill-1"), decode(), decode("decode-1"), aggregated())
    counts = Counter(scene.first().decode.worker_id for _ in range(3000))
    assert set(counts) == {"decode-0", "decode-1", "aggregated-0"}
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_choice_is_even_over_workers_of_different_pools() -> None:
    other = {"page_size_tokens": 64}
    pools = [prefill(), decode(), decode("decode-1"), prefill("p2", **other), decode("d2", **other)]
    scene = Scene(*pools)
    counts = Counter(scene.first().decode.worker_id for _ in range(3000))
    assert set(counts) == {"decode-0", "decode-1", "d2"}
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_unhealthy_workers_are_avoided_and_never_excluded() -> None:
    scene = Scene(prefill(), decode(), decode("decode-1"), decode("decode-2"))
    one, two, three = (worker.start for worker in scene.workers[1:])
    scene.unhealthy = frozenset({one})
    scene.failing = frozenset({two})
    assert chosen(scene) == {("decode-2", "prefill-0")}
    scene.refused = frozenset({three})
    assert chosen(scene) == {("decode-2", "prefill-0")}, "all others are avoided for better reasons"
    scene.unhealthy = frozenset({one, two, three})
    assert chosen(scene) == {("decode-0", "prefill-0")}, "all are unhealthy, and of those one neither fails nor refused"
    scene.unhealthy = scene.failing = scene.refused = frozenset()
    assert len(chosen(scene)) == 3


def test_another_attempt_prefers_untried_workers_and_never_reuses_refusing_ones() -> None:
    scene = Scene(prefill(), decode(), decode("decode-1"))
    p, first, second = (worker.start for worker in scene.workers)
    for _ in range(20):
        route = scene.next(1, {p, first}, {first})
        assert route is not None
        assert _ids(route) == ("decode-1", "prefill-0")
        again = scene.next(1, {p, first, second}, ())
        assert again is not None
    assert scene.next(1, {p, first, second}, {first, second}) is None
    assert scene.next(1, {p}, {p}) is None
    scene.workers = ()
    assert scene.next(1, (), ()) is None


def test_a_trace_names_the_candidates_and_what_was_avoided() -> None:
    scene = Scene(prefill(), prefill("prefill-1"), decode(), decode("decode-1"), aggregated())
    pick = scene.first().pick
    assert (pick.candidates_count, pick.policy, pick.why) == (5, "random", "random among 5 of 5")
    assert set(pick.candidates.split()) == {worker.worker_id for worker in scene.workers}
    scene.unhealthy = frozenset({scene.workers[0].start})
    scene.failing = frozenset({("decode-0", 7), ("gone", 1)})
    assert scene.first().pick.why == "random among 2 of 5, without unhealthy and failing ones"
    route = scene.next(1, {("decode-1", 7), ("aggregated-0", 7)}, {("aggregated-0", 7)})
    assert route is not None
    assert route.pick.candidates_count == 4
    assert route.pick.why == "random among 1 of 4, without unhealthy and failing ones"
    assert "aggregated-0" not in route.pick.candidates


def test_a_trace_of_a_large_fleet_is_short() -> None:
    scene = Scene(*(prefill(f"prefill-{n}") for n in range(40)), *(decode(f"decode-{n}") for n in range(40)))
    pick = scene.first().pick
    assert pick.candidates_count == 1600
    names = pick.candidates.split()
    assert (len(names), len(set(names))) == (16, 16)


def test_a_policy_picks_a_decode_worker_and_then_a_compatible_prefill_worker() -> None:
    policy = ByIndex()
    scene = Scene(prefill(), prefill("prefill-1"), decode(), decode("decode-1"), policy=policy)
    policy.wanted = 1
    assert scene.first().decode.worker_id == "decode-1"
    assert policy.offered == [[("decode-0", 7), ("decode-1", 7)], [("prefill-0", 7), ("prefill-1", 7)]]
    assert scene.first().pick.policy == "by index"


def test_a_view_is_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests come meanwhile, and also where `follow` applied it before."""
    scene, taken = Scene(prefill(), decode()), list[Any]()
    follow = scene.routes._pools.follow

    def counted(workers: Any) -> None:
        taken.append(workers)
        follow(workers)

    monkeypatch.setattr(scene.routes._pools, "follow", counted)
    scene.first()
    scene.first()
    scene.workers = (*scene.workers, decode("decode-1"))
    scene.routes.follow(scene.workers)
    assert len(chosen(scene)) == 2
    assert [len(workers) for workers in taken] == [2, 3]


def test_routes_are_not_recomputed_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(prefill(), decode(), decode("decode-1"))
    scene.unhealthy = frozenset({("decode-1", 7)})
    scene.first()

    def fail(*_: object) -> None:
        raise AssertionError("a request looks at a whole pool")

    monkeypatch.setattr("tandem_frontend.routing.pool.Group.segments", fail)
    for prompt_tokens in (1, 2, 500):
        assert scene.first(prompt_tokens).decode.worker_id == "decode-0"


def test_refusals_are_remembered_for_a_while() -> None:
    clock = ManualClock(5.0)
    refusals = RecentRefusals(clock)
    assert refusals.recent() == frozenset()
    refusals.note(decode())
    clock.advance(AVOIDED_S / 2)
    refusals.note(prefill())
    both = refusals.recent()
    assert both == {decode().start, prefill().start}
    clock.advance(AVOIDED_S / 4)
    refusals.note(decode())
    assert refusals.recent() is both, "the same ones are another object"
    clock.advance(AVOIDED_S / 4 * 3)
    assert refusals.recent() == {decode().start}, "the later refusal counts"
    clock.advance(AVOIDED_S / 4)
    assert refusals.recent() == frozenset()
    assert not refusals._until_s
