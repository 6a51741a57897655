"""The pools' index against a comparison of every pair: the same routes in any fleet, after any changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sized
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.routing.candidates import Route
from tandem_frontend.routing.pools import Pools

from tandem.discovery.view_changes import KnownView
from tandem.domain.worker import (
    LEG_CONTRACT,
    Start,
    Worker,
    WorkerRole,
    WorkerState,
    accepted_keys,
    incompatible_field,
    offered_keys,
)
from tandem.errors import ContextExceeded
from tests.unit.support import every_pair
from tests.unit.support.every_pair import Expected
from tests.unit.support.examples import examples
from tests.unit.support.frontend_workers import CAPABILITIES, prefill
from tests.unit.support.routing_scene import DIGEST, ByIndex, Scene

IDS = [f"w{number}" for number in range(12)]
CONTEXTS = (8, 16, 32)
DIGESTS = ("a" * 64, "d" * 64)
"""Of weights."""
PROMPTS = st.sampled_from([0, 7, 8, 9, 15, 16, 31, 32])


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * 15 + list(others))


WORKERS = st.builds(
    lambda worker_id, epoch, role, state, leg_contract, **capabilities: Worker(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        address=f"{worker_id}:1",
        state=state,
        leg_contract=leg_contract,
        capabilities=replace(CAPABILITIES, **capabilities),
    ),
    worker_id=st.sampled_from(IDS),
    epoch=mostly(1, 2),
    role=st.sampled_from([WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.PREFILL, *WorkerRole]),
    state=mostly(WorkerState.SERVING, WorkerState.DRAINING),
    leg_contract=mostly(LEG_CONTRACT, 1, 3),
    model=mostly("m", "other"),
    model_digest=mostly(DIGESTS[0], DIGESTS[1]),
    tokenizer_digest=mostly(DIGEST, "c" * 64),
    page_size_tokens=mostly(16, 64),
    tensor_parallel_size=mostly(1, 2, 4, 2, 4),
    is_mla=st.booleans(),
    unequal_tp=st.booleans(),
    context_tokens_max=mostly(CONTEXTS[-1], *CONTEXTS * 4),
)
VIEWS = st.lists(WORKERS, max_size=12, unique_by=lambda worker: worker.worker_id).map(tuple)
STARTS = st.frozensets(st.tuples(st.sampled_from(IDS), mostly(1, 2)), max_size=6)
MOMENTS = st.fixed_dictionaries(
    {
        "prompt_tokens": PROMPTS, "unhealthy": STARTS, "failing": STARTS, "refused": STARTS, "tried": STARTS,
        "gone": st.frozensets(st.sampled_from(IDS), max_size=3), "refusing": STARTS,
    }
)  # fmt: skip


def choices(scene: Scene, prompt_tokens: int, later: tuple[Collection[Start], Collection[Start]] | None) -> Any:
    """All routes that could be selected, by decode worker, and the one that was."""
    found: dict[Start, frozenset[Start] | None] = {}
    policy: ByIndex = scene.routes._policy  # type: ignore[assignment]
    policy.wanted, streams = 0, 1
    route: Route | None = None
    while policy.wanted < streams:
        policy.offered = []
        route = scene.first(prompt_tokens) if later is None else scene.next(prompt_tokens, *later)
        if route is None:
            return {}, None
        streams, prefills = len(policy.offered[0]), policy.offered[1:]
        assert route.decode.start not in found, "a worker is offered twice"
        found[route.decode.start] = frozenset(prefills[0]) if prefills else None
        assert len(prefills) == (route.prefill is not None)
        assert not prefills or len(set(prefills[0])) == len(prefills[0])
        policy.wanted += 1
    return found, route


def check(chosen: tuple[Any, Route | None], expected: Expected) -> None:
    found, route = chosen
    assert found == expected.possible
    if route is not None:
        left = f", without {' and '.join(expected.ejected)} ones" if expected.ejected else ""
        left_count = every_pair.count(expected.possible)
        every_count = every_pair.count(expected.every)
        assert route.pick.why == f"by index among {left_count} of {every_count}{left}"
        assert route.pick.candidates_count == every_count
        assert route.pick.candidates
        assert set(route.pick.candidates.split()) <= every_pair.names(expected.every)


def check_first(scene: Scene, prompt_tokens: int, marks: dict[str, frozenset[Start]]) -> None:
    problem = every_pair.problem(scene.workers, DIGEST, prompt_tokens)
    if problem is None:
        every = every_pair.possible(scene.workers, DIGEST, prompt_tokens, LEG_CONTRACT)
        check(choices(scene, prompt_tokens, None), every_pair.preferred(every, marks))
        return
    with pytest.raises(problem) as refusal:
        scene.first(prompt_tokens)
    refused, foreigners = refusal.value, every_pair.foreigners(scene.workers, DIGEST)
    assert type(refused) is problem
    if isinstance(refused, ContextExceeded):
        fitting = [limit for limit in CONTEXTS if every_pair.possible(scene.workers, DIGEST, limit - 1, LEG_CONTRACT)]
        assert refused.metadata["limit"] == str(max(fitting))
    elif foreigners:
        assert refused.metadata["field"] == "leg_contract"
        assert refused.metadata["worker"] in foreigners


def check_next(scene: Scene, moment: dict[str, Any], marks: dict[str, frozenset[Start]]) -> None:
    tried, refusing, prompt_tokens = moment["tried"], moment["refusing"], moment["prompt_tokens"]
    every = every_pair.possible(scene.workers, DIGEST, prompt_tokens, LEG_CONTRACT)
    every = every_pair.without(every, refusing)
    expected = every_pair.preferred(every, {**marks, "tried": tried})
    check(choices(scene, prompt_tokens, (tried, refusing)), expected)


@given(st.lists(st.tuples(VIEWS, st.lists(MOMENTS, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=examples(250), deadline=None)
def test_possible_routes_equal_a_comparison_of_every_pair(story: list[Any]) -> None:
    """Over views that follow one another, with any workers avoided, tried and refused, and for any prompt."""
    scene = Scene(policy=ByIndex())
    for view, moments in story:
        scene.workers = view
        for moment in moments:
            # The objects of those that stay are the same ones, as a view keeps them.
            scene.workers = tuple(worker for worker in scene.workers if worker.worker_id not in moment["gone"])
            marks = {name: moment[name] for name in ("unhealthy", "failing", "refused")}
            scene.unhealthy, scene.failing, scene.refused = marks.values()
            check_first(scene, moment["prompt_tokens"], marks)
            check_next(scene, moment, marks)


def test_pools_after_a_worker_of_another_pool_left_hold_only_prompts_that_fit() -> None:
    small = replace(prefill("p"), capabilities=replace(CAPABILITIES, context_tokens_max=8))
    both = replace(prefill("a"), role=WorkerRole.AGGREGATED, capabilities=replace(CAPABILITIES, context_tokens_max=16))
    large = replace(prefill("q"), capabilities=replace(CAPABILITIES, context_tokens_max=32))
    scene = Scene(small, both, large, policy=ByIndex())
    assert scene.first(8).decode == both
    scene.workers = (both, large)
    with pytest.raises(ContextExceeded):
        scene.first(16)


@pytest.mark.parametrize("refusing", list(itertools.permutations(range(5), 3)), ids=str)
def test_refusing_workers_are_excluded_in_any_order(refusing: tuple[int, ...]) -> None:
    streams = [replace(prefill(f"decode-{number}"), role=WorkerRole.DECODE) for number in range(5)]
    scene = Scene(prefill(), *streams, policy=ByIndex())
    starts = [streams[number].start for number in refusing]
    found, _ = choices(scene, 1, (starts, starts))
    assert set(found) == {worker.start for worker in streams} - set(starts)


@pytest.mark.parametrize("prompt_tokens", [8, 16])
def test_workers_that_refused_and_are_too_small_anyway_hide_no_others(prompt_tokens: int) -> None:
    streams = [
        replace(prefill(f"decode-{context}", context_tokens_max=context), role=WorkerRole.DECODE)
        for context in (8, 16, 17, 32)
    ]
    scene = Scene(prefill(), *streams, policy=ByIndex())
    small = [worker.start for worker in streams if worker.capabilities.context_tokens_max <= prompt_tokens]
    found, _ = choices(scene, prompt_tokens, (small, small))
    assert set(found) == {worker.start for worker in streams} - set(small)


@given(st.lists(WORKERS, min_size=2, max_size=2))
def test_keys_meet_where_two_workers_make_a_pair(workers: list[Worker]) -> None:
    one, other = (worker.capabilities for worker in workers)
    fits = incompatible_field(one, other) is None
    assert len(set(offered_keys(one)) & set(accepted_keys(other))) == fits


@given(st.lists(VIEWS, min_size=1, max_size=4))
def test_nothing_is_kept_of_removed_workers(views: list[tuple[Worker, ...]]) -> None:
    pools = Pools("m", DIGEST)
    for view in views:
        pools.follow(view)
    pools.follow(())
    assert [*pools._members, *pools._pools, *pools._groups, *pools._contexts, *pools._wholes] == []
    assert not pools._model_digests


@given(st.lists(VIEWS, min_size=1, max_size=4), st.sampled_from(DIGESTS))
def test_members_with_other_weights_equal_a_look_at_each(views: list[tuple[Worker, ...]], digest: str) -> None:
    pools = Pools("m", DIGEST)
    for view in views:
        pools.follow(view)
    others = {start for start, member in pools._members.items() if member.worker.capabilities.model_digest != digest}
    assert pools.with_other_weights(digest) == others


def test_cached_results_are_bounded() -> None:
    """Each worker of a fleet may have a context of its own, and each request another length."""
    scene = Scene()
    scene.workers = tuple(
        replace(worker, capabilities=replace(worker.capabilities, context_tokens_max=100 + number))
        for number in range(300)
        for worker in (prefill(f"prefill-{number}"), replace(prefill(f"decode-{number}"), role=WorkerRole.DECODE))
    )
    for prompt_tokens in random.Random(0).choices(range(399), k=500):
        route = scene.first(prompt_tokens)
        assert min(worker.capabilities.context_tokens_max for worker in route.workers) > prompt_tokens
    kept: list[Sized] = [scene.routes._first, scene.routes._pools._wholes]
    kept += [pool._shares for pool in scene.routes._pools._pools.values()]
    assert [len(results) <= 64 for results in kept] == [True] * 3


def test_a_view_is_compared_by_identity() -> None:
    known, one, other = KnownView(), prefill(), prefill("prefill-1")
    assert known.replace((one, other)) == ([], [one, other])
    assert known.replace((one, other)) == ([], [])
    changed = replace(other, state=WorkerState.DRAINING)
    assert known.replace((one, changed)) == ([other], [changed])
    assert known.replace((changed,)) == ([one], [])
