"""Text a piece at a time, under every cutting of the tokens, on two kinds of tokenizers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.detokenization import REPLACEMENT, WINDOW_TOKENS_MAX, Detokenizer
from tokenizers import decoders, models, pre_tokenizers

DEMO = tokenizers.Tokenizer.from_file(str(Path(__file__).parents[2] / "models" / "tandem-demo" / "tokenizer.json"))
TEXTS = [
    "plain words, and then some more of them.",
    "Größe 東京 ก็ไม่ไหว 👩‍👩‍👧 e\u0301 \u202eright to left",
    "🏳️‍🌈" * 5,
    "  leading and trailing   \n\n\t",
]


class Plain:
    """A tokenizer as the detokenizer sees it; counts its work."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.longest_tokens = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.longest_tokens = max(self.longest_tokens, len(token_ids))
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def byte_fallback() -> tokenizers.Tokenizer:
    """Spaces as ▁ and unknown characters as bytes: what Llama 2 and Gemma do."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "the", "▁a", "a", "b", "."]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


FALLBACK = byte_fallback()


def stream(backend: tokenizers.Tokenizer, prompt: list[int], batches: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(Plain(backend), prompt)
    return [*(detokenizer.push(batch) for batch in batches), detokenizer.flush()]


def cut(token_ids: list[int], places: list[int]) -> list[list[int]]:
    borders = sorted({0, len(token_ids), *(place % (len(token_ids) + 1) for place in places)})
    return [token_ids[start:end] for start, end in itertools.pairwise(borders)]


@given(st.lists(st.integers(6, 1535), max_size=60), st.lists(st.integers(0, 60), max_size=12))
def test_any_tokens_under_any_cutting_are_the_whole_text(token_ids: list[int], places: list[int]) -> None:
    """Byte-level decoding is exact for every sequence, also for those that are not UTF-8."""
    prompt = DEMO.encode("Once upon a time").ids
    whole = DEMO.decode(prompt + token_ids)[len(DEMO.decode(prompt)) :]
    assert "".join(stream(DEMO, prompt, cut(token_ids, places))) == whole


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", [DEMO, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_token_by_token_no_half_character_is_shown(backend: tokenizers.Tokenizer, text: str) -> None:
    prompt = backend.encode("the", add_special_tokens=False).ids
    token_ids = backend.encode(text, add_special_tokens=False).ids
    pieces = stream(backend, prompt, [[token_id] for token_id in token_ids])
    assert REPLACEMENT not in "".join(pieces)
    assert "".join(pieces) == backend.decode(prompt + token_ids)[len(backend.decode(prompt)) :]


def test_a_character_cut_off_at_the_end_shows_as_replacement() -> None:
    token_ids = FALLBACK.encode("a🙂", add_special_tokens=False).ids[:-1]
    pieces = stream(FALLBACK, [], [[token_id] for token_id in token_ids])
    assert set(pieces[-1]) == {REPLACEMENT}
    assert "".join(pieces[:-1]).strip() == "a"


def test_a_prompt_that_ends_inside_a_character() -> None:
    whole = FALLBACK.encode("a🙂b", add_special_tokens=False).ids
    assert "".join(stream(FALLBACK, whole[:3], [[token_id] for token_id in whole[3:]])) == "🙂b"


def test_prompts_own_characters_are_never_shown_again() -> None:
    """A run of bytes is replaced as a whole while its end is unfinished, also the part that is the prompt's."""
    whole = FALLBACK.encode("a🙂🙃b", add_special_tokens=False).ids
    for cut_place in range(2, len(whole)):
        shown = "".join(stream(FALLBACK, whole[:cut_place], [[token_id] for token_id in whole[cut_place:]]))
        assert FALLBACK.decode(whole).endswith(shown)
        assert REPLACEMENT not in shown
        assert shown.endswith("b")


def test_bytes_that_never_become_text_do_not_stall_it() -> None:
    plain = Plain(DEMO)
    invalid = DEMO.token_to_id("ÿ")  # byte 0xFF in the byte-level alphabet
    assert invalid is not None
    detokenizer = Detokenizer(plain, [])
    shown = "".join(detokenizer.push([invalid]) for _ in range(1000))
    assert len(shown) >= 1000 - WINDOW_TOKENS_MAX - 1
    assert plain.longest_tokens <= 2 * (WINDOW_TOKENS_MAX + 1)


def test_work_for_a_token_does_not_grow_with_the_stream() -> None:
    plain = Plain(DEMO)
    detokenizer = Detokenizer(plain, DEMO.encode("x " * 500).ids)
    for token_id in DEMO.encode("Once upon a time there was a fox. " * 100).ids:
        detokenizer.push([token_id])
    assert plain.longest_tokens < 20


def test_special_tokens_have_no_text_unless_asked_for() -> None:
    end = DEMO.token_to_id("<|end|>")
    assert "".join(stream(DEMO, [], [[end], [end]])) == ""
    shown = Detokenizer(Plain(DEMO), [], skip_special_tokens=False)
    assert shown.push([end]) + shown.flush() == "<|end|>"
