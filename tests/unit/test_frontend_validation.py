"""Validation at its borders, and its ranges against what the contract says in words."""

from __future__ import annotations

import asyncio
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.preparation.tokenizer import Tokenizer
from tandem_frontend.preparation.validation import (
    CHECKED_TOKENS,
    TOOL_GRAMMAR_BYTES_MAX,
    check_prompt_ids,
    checked_generate,
)

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.sampling import RANGES, Range
from tandem.errors import InvalidRequest

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = Tokenizer.open(REPOSITORY / "models" / "tandem-demo")
SAMPLING = (REPOSITORY / "protos/tandem/api/types/v1/sampling.proto").read_text()


def request_of(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="Once", **fields)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_those_of_the_contract(name: str) -> None:
    said = re.search(rf"// ([^\n]*)\n  optional float {name} = ", SAMPLING)
    assert said is not None
    words = re.search(r"(above )?(-?\d+),?(?: up)? to (\d+)\b", said[1])
    assert words is not None, said[1]
    assert RANGES[name] == Range(float(words[2]), float(words[3]), includes_lowest=words[1] is None)


@pytest.mark.parametrize("name", RANGES)
async def test_borders(name: str) -> None:
    allowed = RANGES[name]
    lowest, highest, with_lowest = allowed.lowest, allowed.highest, allowed.includes_lowest
    inside = [highest, (lowest + highest) / 2, *([lowest] if with_lowest else [])]
    for value in inside:
        await checked_generate(request_of(sampling={name: value}), TOKENIZER)
    outside = [highest + 0.01, lowest - 0.01, math.nan, math.inf, *([] if with_lowest else [lowest])]
    for value in outside:
        with pytest.raises(InvalidRequest) as refused:
            await checked_generate(request_of(sampling={name: value}), TOKENIZER)
        assert refused.value.field == f"sampling.{name}"


@pytest.mark.parametrize("top_k", [-1, 1, 100_000])
async def test_top_k_that_is_allowed(top_k: int) -> None:
    assert (await checked_generate(request_of(sampling={"top_k": top_k}), TOKENIZER)).sampling.top_k == top_k


async def test_omitted_fields_get_their_defaults() -> None:
    wanted = await checked_generate(request_of(), TOKENIZER)
    assert wanted.max_tokens == 2048 - len(wanted.token_ids)
    assert re.fullmatch("[0-9a-f]{32}", wanted.request_id)
    assert (wanted.min_tokens, wanted.guided, wanted.logprobs, wanted.priority) == (None, None, None, None)
    assert not wanted.sampling.HasField("temperature")


async def test_a_zero_is_a_zero() -> None:
    wanted = await checked_generate(request_of(sampling={"temperature": 0.0, "seed": 0}, priority=0), TOKENIZER)
    assert wanted.sampling.HasField("temperature")
    assert wanted.sampling.HasField("seed")
    assert wanted.priority == 0


async def test_the_last_place_of_the_context_is_used() -> None:
    wanted = await checked_generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 2047)), TOKENIZER)
    assert wanted.max_tokens == 1


async def test_a_huge_prompt_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tokenised(*arguments: Any, **keywords: Any) -> list[int]:
        raise AssertionError("20 MB were tokenised")

    monkeypatch.setattr(Tokenizer, "encode", tokenised)
    for text in ("x" * 20_000_000, "é" * 10_000_000):
        begin_s = time.process_time()
        with pytest.raises(InvalidRequest) as refused:
            await checked_generate(pb.GenerateRequest(prompt=text), TOKENIZER)
        assert refused.value.field == "prompt"
        assert refused.value.metadata["limit"] == "2048"
        # Far from what tokenising takes; processor time, because the machine may be busy.
        assert time.process_time() - begin_s < 0.5


LARGE = Tokenizer(TOKENIZER._backend, replace(TOKENIZER._card, context_tokens_max=2**17), None)


async def test_token_ids_are_checked_to_the_last_and_not_copied() -> None:
    ids = [5] * 3 * CHECKED_TOKENS
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))
    wanted = await checked_generate(request, LARGE)
    assert wanted.token_ids == ids
    asked: object = request.token_ids.ids
    assert wanted.token_ids is asked
    for place in (0, CHECKED_TOKENS, len(ids) - 1):
        for wrong in (-1, TOKENIZER.vocabulary_size):
            ids[place] = wrong
            with pytest.raises(InvalidRequest, match=f"{wrong} is outside the vocabulary") as refused:
                await checked_generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids)), LARGE)
            assert refused.value.field == "token_ids"
            ids[place] = 5


async def test_others_are_served_while_many_token_ids_are_checked() -> None:
    checked = asyncio.create_task(check_prompt_ids("token_ids", [5] * 3 * CHECKED_TOKENS, TOKENIZER.vocabulary_size))
    for _ in range(2):
        await asyncio.sleep(0)
        assert not checked.done()
    await checked


async def test_a_texts_token_beyond_the_models_vocabulary_is_refused() -> None:
    """Some checkpoints have added tokens beyond their embedding, and those would take an engine down."""
    ids = await TOKENIZER.encode("a b", add_special_tokens=True)
    card = replace(TOKENIZER._card, vocabulary_size=max(ids))
    with pytest.raises(InvalidRequest, match=f"{max(ids)} is outside the vocabulary") as refused:
        await checked_generate(pb.GenerateRequest(prompt="a b"), Tokenizer(TOKENIZER._backend, card, None))
    assert refused.value.field == "prompt"


async def test_a_grammar_made_of_tools_has_a_limit_of_its_own() -> None:
    request = request_of(guided={"ebnf": "x" * 50_000})
    with pytest.raises(InvalidRequest, match="16384"):
        await checked_generate(request, TOKENIZER)
    assert (await checked_generate(request, TOKENIZER, has_tool_grammar=True)).guided == request.guided
    request.guided.ebnf = "x" * (TOOL_GRAMMAR_BYTES_MAX + 1)
    with pytest.raises(InvalidRequest) as refused:
        await checked_generate(request, TOKENIZER, has_tool_grammar=True)
    assert refused.value.field == "tools"


async def test_request_ids() -> None:
    assert (await checked_generate(request_of(request_id="a.B-9_" * 20), TOKENIZER)).request_id == "a.B-9_" * 20
    for wrong in ("", "a b", "a" * 129, "ä", "a\n"):
        with pytest.raises(InvalidRequest) as refused:
            await checked_generate(request_of(request_id=wrong), TOKENIZER)
        assert refused.value.field == "request_id"
