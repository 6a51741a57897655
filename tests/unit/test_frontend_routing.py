"""Candidates and the random choice among them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from frontend_workers import CAPABILITIES, aggregated, decode, prefill
from tandem_frontend.routing.candidates import Candidate, able_to_hold, candidates
from tandem_frontend.routing.random_choice import choose

from tandem.errors import ContextExceeded, IncompatibleWorkers, NoWorkers
from tandem.model.worker import PAIR_FIELDS, Worker, WorkerState

DIGEST = CAPABILITIES.tokenizer_digest


def possible(*workers: Worker) -> tuple[Candidate, ...]:
    return candidates(workers, "m", DIGEST)


def test_both_shapes_are_candidates() -> None:
    p, d, a = prefill(), decode(), aggregated()
    assert set(possible(p, d, a)) == {Candidate(d, (p,)), Candidate(a, ())}


@pytest.mark.parametrize(
    ("workers", "role"),
    [((), "any"), ((prefill(),), "decode"), ((decode(),), "prefill")],
    ids=["nobody", "prefill only", "decode only"],
)
def test_a_missing_role_is_named(workers: tuple[Worker, ...], role: str) -> None:
    with pytest.raises(NoWorkers) as refused:
        possible(*workers)
    assert refused.value.metadata["role"] == role
    assert refused.value.retry_delay_s is not None


def test_workers_that_drain_or_serve_another_model_do_not_count() -> None:
    with pytest.raises(NoWorkers):
        possible(replace(aggregated(), state=WorkerState.DRAINING), aggregated("other", model="other"))


OTHER = {"tensor_parallel_size": 2, "page_size_tokens": 64}


CHECKED_BEFORE = ("model", "tokenizer_digest")


@pytest.mark.parametrize("field", [*(f for f in PAIR_FIELDS if f not in CHECKED_BEFORE), "tensor_parallel_size"])
def test_what_differs_between_two_legs_is_named(field: str) -> None:
    with pytest.raises(IncompatibleWorkers) as refused:
        possible(prefill(), decode(**{field: OTHER.get(field, "other")}))
    assert refused.value.metadata == {"field": field, "prefill": "prefill-0", "decode": "decode-0"}
    assert field in str(refused.value)


def test_a_tokenizer_that_is_not_the_frontends_is_named() -> None:
    with pytest.raises(IncompatibleWorkers) as refused:
        candidates([prefill(), decode()], "m", "c" * 64)
    assert refused.value.metadata["field"] == "tokenizer_digest"


def test_one_bad_pair_does_not_hide_a_good_one() -> None:
    good_prefill, good_decode, bad = prefill(), decode(), decode("decode-1", page_size_tokens=64)
    assert possible(good_prefill, bad, good_decode) == (Candidate(good_decode, (good_prefill,)),)


def test_a_prompt_goes_where_there_is_room_for_it() -> None:
    small, large = decode(context_tokens_max=64), decode("decode-1", context_tokens_max=128)
    p, small_p = prefill(context_tokens_max=128), prefill("prefill-1", context_tokens_max=32)
    workers = possible(p, small_p, small, large)
    assert able_to_hold(workers, 31) == workers
    assert able_to_hold(workers, 63) == (Candidate(small, (p,)), Candidate(large, (p,)))
    assert able_to_hold(workers, 64) == able_to_hold(workers, 127) == (Candidate(large, (p,)),)
    with pytest.raises(ContextExceeded) as refused:
        able_to_hold(workers, 128)
    assert refused.value.metadata == {"field": "token_ids", "limit": "128"}
    with pytest.raises(ContextExceeded, match="the 32 that"):
        able_to_hold(possible(small_p, large), 32)


def test_mla_lets_tensor_parallelism_differ() -> None:
    assert possible(prefill(is_mla=True), decode(is_mla=True, tensor_parallel_size=2))


def test_choice_is_even_over_those_that_stream() -> None:
    workers = [prefill(), prefill("prefill-1"), decode(), decode("decode-1"), aggregated()]
    rng = random.Random(0)
    counts = Counter(choose(possible(*workers), rng).decode.worker_id for _ in range(3000))
    assert set(counts) == {"decode-0", "decode-1", "aggregated-0"}
    assert max(counts.values()) < 1.2 * min(counts.values())
