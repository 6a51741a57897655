"""Log probabilities end where the text does: a stop string cuts both, also inside a token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tandem_frontend.openai.chat_choice import ChatChoice
from tandem_frontend.openai.completions import CompletionChoice
from tandem_frontend.openai.logprobs import TokenTexts, VisibleTokens
from tandem_frontend.response.stop_matching import StopMatcher

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tests.unit.test_frontend_tokenization import demo_tokenizer

TEXT = "Mia hid the red key in the old barn. Größe 🙂 yes"
STOP, LENGTH = generation_pb2.FINISH_REASON_STOP, generation_pb2.FINISH_REASON_LENGTH


def generated(stop: str) -> tuple[list[pb.GenerateChunk], pb.GenerateFinish, str]:
    """The chunks of TEXT, one for each token as the relay cuts them; the finish, and the whole text."""
    tokenizer, matcher, chunks, text = demo_tokenizer(), StopMatcher((stop,)), [], ""
    ids = list(asyncio.run(tokenizer.encode(TEXT, add_special_tokens=False)))
    sent = ""
    for number, token_id in enumerate(ids, 1):
        whole = tokenizer.decode(ids[:number]).rstrip("\ufffd")
        step = matcher.push(whole[len(sent) :], may_end=True)
        sent, text = whole, text + step.text
        entry = generation_pb2.TokenLogprob(token_id=token_id, logprob=-float(number))
        chunks.append(pb.GenerateChunk(text=step.text, token_ids=[token_id], logprobs=[entry]))
        if step.matched is not None:
            finish = pb.GenerateFinish(reason=STOP, matched_stop=generation_pb2.MatchedStop(stop=step.matched))
            return chunks, finish, text
    rest = matcher.flush()
    chunks.append(pb.GenerateChunk(text=rest))
    return chunks, pb.GenerateFinish(reason=LENGTH), text + rest


def request(stop: str) -> pb.GenerateRequest:
    made = pb.GenerateRequest()
    made.stopping.stop.append(stop)
    made.logprobs.top_logprobs = 0
    return made


STOPS = ["red", " red", "the red key", "d", "key in", "old barn.", "öße", "🙂", " yes", "nowhere", "yesterday"]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", [ChatChoice, CompletionChoice])
def test_tokens_are_the_text(kind: Any, stop: str) -> None:
    chunks, finish, text = generated(stop)
    texts = TokenTexts(demo_tokenizer())
    is_chat = kind is ChatChoice
    choice = kind(0, request(stop), texts, None) if is_chat else kind(0, "", request(stop), texts)
    entries = [entry for chunk in chunks for entry in choice.take(chunk)]
    entries += asyncio.run(choice.end(finish))
    whole = choice.as_json()

    def bytes_of(logprobs: Any) -> bytes:
        if is_chat:
            return b"".join(bytes(token["bytes"]) for token in logprobs["content"])
        named = [token.removeprefix("bytes:") for token in logprobs["tokens"]]
        return b"".join(
            bytes.fromhex(name.replace("\\x", "")) if name != token else token.encode()
            for name, token in zip(named, logprobs["tokens"], strict=True)
        )

    assert bytes_of(whole["logprobs"]) == text.encode()
    streamed = b"".join(bytes_of(entry["logprobs"]) for entry in entries if entry["logprobs"] is not None)
    assert streamed == text.encode()
    said = whole["message"]["content"] if is_chat else whole["text"]
    assert said == text


def test_without_stop_strings_no_entry_waits() -> None:
    chunks, _, _ = generated("nowhere")
    made = pb.GenerateRequest()
    made.logprobs.top_logprobs = 0
    visible = VisibleTokens(made, TokenTexts(demo_tokenizer()))
    for chunk in chunks:
        assert list(visible.take(pb.GenerateChunk(logprobs=chunk.logprobs))) == list(chunk.logprobs)


def test_the_stop_token_has_no_entry() -> None:
    tokenizer = demo_tokenizer()
    end = generation_pb2.TokenLogprob(token_id=tokenizer.eos_token_ids[0])
    assert not VisibleTokens(pb.GenerateRequest(), TokenTexts(tokenizer)).take(pb.GenerateChunk(logprobs=[end]))
