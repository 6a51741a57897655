"""Echoed prompts with log probabilities: one entry for each token, by position, as harnesses read them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tandem_frontend.openai.completions import EchoedChoice
from tandem_frontend.openai.logprobs import LOWEST, TokenTexts
from tandem_frontend.preparation.validation import checked_generate

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.domain.limits import PROMPT_LOGPROBS_MAX
from tandem.errors import InvalidRequest
from tests.unit.test_frontend_tokenization import demo_tokenizer

PROMPT = "Once upon a time"
STOP = generation_pb2.FINISH_REASON_STOP


def entry(token_id: int, logprob: float) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.RankedToken(token_id=token_id, logprob=logprob)]
    return generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob, top=top)


async def echoed(*, is_alone: bool, with_logprobs: bool = True) -> tuple[dict[str, Any], list[int], int]:
    """The choice for a prompt and two generated tokens, the second one the end; the prompt's tokens, and the end."""
    tokenizer = demo_tokenizer()
    ids = list(await tokenizer.encode(PROMPT, add_special_tokens=True))
    end = tokenizer.eos_token_ids[0]
    request = pb.GenerateRequest()
    if with_logprobs:
        request.logprobs.top_logprobs = 1
    choice = EchoedChoice(0, PROMPT, ids, request, TokenTexts(tokenizer), is_alone=is_alone)
    more = list(await tokenizer.encode(" there", add_special_tokens=False))[:1]
    chunk = pb.GenerateChunk(text=tokenizer.decode(more), token_ids=[*more, end])
    finish = pb.GenerateFinish(reason=STOP)
    if with_logprobs:
        chunk.logprobs.extend([entry(more[0], -0.5), entry(end, -0.25)])
        finish.prompt_logprobs.extend(entry(token_id, -float(place)) for place, token_id in enumerate(ids[1:], 1))
        finish.prompt_logprobs[-1].logprob = -math.inf
    assert choice.take(chunk) == []
    assert await choice.end(finish) == [choice.as_json()]
    return choice.as_json(), ids, end


async def test_every_token_has_an_entry_and_the_first_has_no_value() -> None:
    said, ids, end = await echoed(is_alone=False)
    logprobs, tokenizer = said["logprobs"], demo_tokenizer()
    count = len(ids) + 2
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(logprobs, count)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-3] == [-float(place) for place in range(1, len(ids) - 1)]
    assert logprobs["token_logprobs"][-3:] == [LOWEST, -0.5, -0.25]
    assert logprobs["tokens"][-1] == tokenizer.decode((end,), skip_special_tokens=False)
    assert said["text"].startswith(PROMPT)
    assert said["text"] != PROMPT
    for token, begin in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        is_shown = token not in (logprobs["tokens"][0], logprobs["tokens"][-1])
        assert not is_shown or said["text"][begin : begin + len(token)] == token
    assert said["finish_reason"] == "stop"


async def test_an_echo_alone_has_the_prompt_only() -> None:
    said, ids, _ = await echoed(is_alone=True)
    assert said["text"] == PROMPT
    assert len(said["logprobs"]["tokens"]) == len(ids)
    assert said["finish_reason"] == "length"
    said, _, _ = await echoed(is_alone=True, with_logprobs=False)
    assert (said["text"], said["logprobs"]) == (PROMPT, None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"stop": ["x"]}, "stopping.stop"),
        ({"ignore_eos": True, "stop_token_ids": [3]}, "stopping.stop_token_ids"),
    ],
)
async def test_what_ends_a_generation_at_the_frontend_excludes_them(change: dict[str, Any], field: str) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, stopping=change)  # type: ignore[arg-type]
    request.logprobs.prompt = True
    with pytest.raises(InvalidRequest) as refused:
        await checked_generate(request, demo_tokenizer())
    assert refused.value.field == field


async def test_their_number_is_limited() -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 2_000))
    request.logprobs.prompt = True
    assert len((await checked_generate(request, demo_tokenizer())).token_ids) == 2_000
    request.logprobs.top_logprobs = 20
    assert PROMPT_LOGPROBS_MAX > 2_000 * 21
    await checked_generate(request, demo_tokenizer())
    long = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7] * 2_000), logprobs=request.logprobs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tandem_frontend.preparation.validation.PROMPT_LOGPROBS_MAX", 41_999)
        with pytest.raises(InvalidRequest) as refused:
            await checked_generate(long, demo_tokenizer())
    assert refused.value.field == "logprobs.prompt"
