"""Tokens of the simulated engine: a function of the whole sequence so far, and of nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.domain.checkpoint import read_checkpoint
from tandem.engine.simulated.tokens import (
    NO_STATE,
    Vocabulary,
    advance,
    digest,
    drawn,
    expected_tokens,
    read_vocabulary,
)
from tandem.errors import StartError
from tandem.testing.fake_model import EOS_TOKEN_ID, SPECIAL_TOKENS, write_fake_model

VOCABULARY = Vocabulary(range(3, 200), 2)
prompts = st.lists(st.integers(0, 2**32), min_size=1, max_size=40)


@given(prompts, st.integers(1, 20), st.integers(0, 20))
def test_prompt_plus_tokens_sent_continues_exactly(prompt: list[int], count: int, sent: int) -> None:
    whole = expected_tokens(VOCABULARY, prompt, count)
    sent = min(sent, count)
    assert expected_tokens(VOCABULARY, prompt + whole[:sent], count - sent) == whole[sent:]


@given(prompts, prompts)
def test_every_token_and_its_position_matter(one: list[int], other: list[int]) -> None:
    assert (digest(one) == digest(other)) == (one == other)


@given(prompts)
def test_only_ordinary_tokens_come(prompt: list[int]) -> None:
    assert all(token in VOCABULARY.ordinary for token in expected_tokens(VOCABULARY, prompt, 10))


def test_tokens_are_the_same_in_every_release() -> None:
    # Recorded values: processes of two releases, or of two machines, must agree.
    assert digest([1, 2, 3]).hex() == "dde3d3527aeff7dbbb0edf0d16b65c64"
    assert expected_tokens(VOCABULARY, [1, 2, 3], 6) == [154, 195, 169, 191, 7, 167]


def test_the_digest_of_an_empty_prompt_is_a_state() -> None:
    assert digest([]) != NO_STATE
    assert advance(NO_STATE, 1) != advance(digest([]), 1)


@given(prompts)
def test_refused_tokens_do_not_come(prompt: list[int]) -> None:
    state = digest(prompt)
    first = VOCABULARY.next_token(state)
    second = VOCABULARY.next_token(state, refuse=lambda t: t == first)
    assert second != first
    assert second in VOCABULARY.ordinary


def test_end_comes_by_chance_and_never_against_a_refusal() -> None:
    vocabulary = Vocabulary(range(3, 200), 2, eos_chance=0.5)
    states = [digest([i]) for i in range(400)]
    ends = [state for state in states if vocabulary.next_token(state) == 2]
    assert 120 < len(ends) < 280
    assert all(vocabulary.next_token(state, refuse=lambda t: t == 2) != 2 for state in ends)


@given(prompts, st.integers(0, 10))
def test_logprobs_are_a_plausible_distribution(prompt: list[int], top_count: int) -> None:
    state = digest(prompt)
    token = VOCABULARY.next_token(state)
    logprob = VOCABULARY.logprob(state, token, top_count)
    assert (logprob.token_id, len(logprob.top)) == (token, top_count)
    assert len({t for t, _ in logprob.top}) == top_count
    assert sum(math.exp(p) for _, p in logprob.top) <= 1 + 1e-9
    values = [logprob.logprob, *(p for _, p in logprob.top[1:])]
    assert values == sorted(values, reverse=True)
    assert logprob.logprob <= 0


def test_vocabulary_of_a_model_leaves_out_what_is_special(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(read_checkpoint(write_fake_model(tmp_path)))
    assert vocabulary.eos_token_id == EOS_TOKEN_ID
    assert not set(range(len(SPECIAL_TOKENS))) & set(vocabulary.ordinary)
    assert len(vocabulary.ordinary) > 256


@pytest.mark.parametrize("count", [1, 7])
def test_expected_tokens_counts(count: int) -> None:
    assert len(expected_tokens(VOCABULARY, [5], count)) == count


@pytest.mark.parametrize("added", [[3], 3, [{"special": True}], ["x"]])
def test_damaged_added_tokens_are_one_sentence(tmp_path: Path, added: Any) -> None:
    file = write_fake_model(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens": added}))
    with pytest.raises(StartError, match=r"tokenizer\.json is damaged: an added token"):
        read_vocabulary(read_checkpoint(tmp_path))


def test_a_seed_changes_what_follows_and_repeats() -> None:
    state = digest([1, 2, 3])
    assert drawn(state, 5) == drawn(state, 5)
    assert len({drawn(state, seed) for seed in (0, 1, -1, 2**63 - 1, -(2**63))} | {state}) == 6
