"""Text a piece at a time, under every cutting of the tokens, on tokenizers of every kind there is.

Byte-level ones, those with a token for each byte, those whose decoders look at neighbours; with a table and without.
"""

from __future__ import annotations

import codecs
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem_frontend.response.detokenizer import REPLACEMENT, TABLE_CONTEXT_TOKENS, WINDOW_TOKENS_MAX, Detokenizer
from tandem_frontend.response.token_table import TokenTable
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tests.unit.support.examples import examples
from tools.make_tiny_model import write_tokenizer

DEMO = tokenizers.Tokenizer.from_file(str(Path(__file__).parents[2] / "models" / "tandem-demo" / "tokenizer.json"))
TEXTS = [
    "plain words, and then some more of them.",
    "Größe 東京 ก็ไม่ไหว 👩‍👩‍👧 e\u0301 \u202eright to left",
    "🏳️‍🌈" * 5,
    "  leading and trailing   \n\n\t",
    "नमस्ते العربية 안녕하세요 𝔘𝔫𝔦 \ufffd Быстрая лиса",
]
SCRIPTS = "aé ß京ก็👩\u200d🙂न\u0301\u202e\ufffd\n▁#'."
"""Letters of one to four bytes, and marks that decoders give a meaning to."""
SPECIAL = ("<s>", "</s>", "<|user|>")


class Plain:
    """A tokenizer as the detokenizer sees it; counts its work."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.longest_tokens = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.longest_tokens = max(self.longest_tokens, len(token_ids))
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class WithTable(Plain):
    """The same with a table of its tokens."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        self.token_table = TokenTable.read(backend, token_count(backend))


def token_count(backend: tokenizers.Tokenizer) -> int:
    return 1 + max(backend.get_vocab().values())


def tiny(tmp: Path) -> tokenizers.Tokenizer:
    write_tokenizer(tmp, seed=0)
    return tokenizers.Tokenizer.from_file(str(tmp / "tokenizer.json"))


def by_bytes(*, strips: bool = True) -> tokenizers.Tokenizer:
    """Spaces as ▁ and unknown characters as bytes: what Llama 2 and, without the strip, Gemma do."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁the", "the", "▁a", "a", "b", ".", "京"]
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    backend.add_special_tokens(list(SPECIAL))
    return backend


def unigram(decoder: Any) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [(piece, -2.0) for piece in ("▁", "▁the", "the", "▁a", "a", "b", "ing", "京", ".", "▁▁▁")]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoder
    backend.add_special_tokens(list(SPECIAL))
    return backend


def wordpiece() -> tokenizers.Tokenizer:
    pieces = [
        "[UNK]",
        "the",
        "a",
        "##ing",
        "##s",
        "fox",
        "run",
        ".",
        ",",
        "'",
        "##é",
        "é",
        "京",
        "🙂",
        "do",
        "not",
        "-",
    ]
    backend = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def suffixed() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "the</w>", "a</w>", "fo", "x</w>", "é</w>", "é", "京", "🙂</w>", "."]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>")
    )
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def trained() -> tokenizers.Tokenizer:
    """Byte-level, with added tokens of all kinds."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]  # its stub has no types
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    # One is text in the letters of bytes too, and one would be bytes that are no UTF-8.
    backend.add_tokens(["<think>", "ÿé", "\n\n", AddedToken("  ", normalized=True), "京都"])
    return backend


@pytest.fixture(scope="module")
def tiny_backend(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tiny(tmp_path_factory.mktemp("tiny"))


LLAMA, GEMMA, TRAINED = by_bytes(), by_bytes(strips=False), trained()
METASPACE = unigram(decoders.Metaspace())
NEVER_PREPENDED = unigram(decoders.Metaspace(prepend_scheme="never"))
UNIGRAM_BYTES = unigram(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))
WORDPIECE, SUFFIXED = wordpiece(), suffixed()
EXACT = {"demo": DEMO, "trained": TRAINED, "metaspace": METASPACE, "never": NEVER_PREPENDED}
"""Of whose tokens every sequence is the text of the whole."""
BY_BYTES = {"llama": LLAMA, "gemma": GEMMA}
"""Where a byte that is no character spoils its neighbours in the whole."""
WINDOWED = {"wordpiece": WORDPIECE, "suffixed": SUFFIXED, "unigram bytes": UNIGRAM_BYTES}
EVERY = EXACT | BY_BYTES | WINDOWED
DECODERS = {name: WithTable(backend) for name, backend in EVERY.items()}

CUTS = st.lists(st.integers(0, 60), max_size=12)


def ids_of(name: str, most: int) -> st.SearchStrategy[list[int]]:
    """Drawn from the whole vocabulary, half of them from what is no text by itself, or from a text."""
    backend, table = EVERY[name], DECODERS[name].token_table
    anywhere = st.integers(0, token_count(backend) - 1)
    parts = [i for i, piece in enumerate(table.whole) if isinstance(piece, bytes)] if table is not None else []
    drawn = st.lists(anywhere | st.sampled_from(parts) if parts else anywhere, max_size=most)
    texts = st.text(SCRIPTS, max_size=most)
    return drawn | texts.map(lambda text: backend.encode(text, add_special_tokens=False).ids[:most])


def id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None
    return found


def cut(token_ids: list[int], places: list[int]) -> list[list[int]]:
    borders = sorted({0, len(token_ids), *(place % (len(token_ids) + 1) for place in places)})
    return [token_ids[start:end] for start, end in itertools.pairwise(borders)]


def shown(decoder: Any, prompt: list[int], batches: list[list[int]], *, skip: bool = True) -> str:
    detokenizer = Detokenizer(decoder, prompt, skip_special_tokens=skip)
    return "".join([*(detokenizer.push(batch) for batch in batches), detokenizer.flush()])


def finished(backend: tokenizers.Tokenizer, table: TokenTable, prompt: list[int], *, skip: bool) -> str:
    """A prompt's text without the character that it has only begun."""
    if table.drops_first_space:
        return backend.decode(prompt, skip_special_tokens=skip)
    pieces = table.shown if skip else table.whole
    own = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in (pieces[i] for i in prompt))
    return codecs.getincrementaldecoder("utf-8")(table.errors).decode(own)


def by_runs(table: TokenTable, token_ids: list[int], *, skip: bool) -> str:
    """Whole characters as they are, and a replacement for each byte that is in none."""
    pieces = table.shown if skip else table.whole
    own = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in (pieces[i] for i in token_ids))
    text = ""
    while own:
        size = next((size for size in (1, 2, 3, 4) if is_character(own[:size])), 0)
        text += own[:size].decode() or REPLACEMENT
        own = own[size or 1 :]
    return text


def is_character(own: bytes) -> bool:
    try:
        return len(own.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data(), places=CUTS, skip=st.booleans())
@settings(max_examples=examples(150), deadline=None)
def test_any_tokens_under_any_cutting_are_the_whole_text(name: str, data: Any, places: list[int], skip: bool) -> None:
    """Also for sequences that are no UTF-8, behind prompts that end inside a character, or that have no text."""
    backend, decoder = EXACT[name], DECODERS[name]
    assert decoder.token_table is not None
    prompt, token_ids = data.draw(ids_of(name, 12)), data.draw(ids_of(name, 50))
    before = finished(backend, decoder.token_table, prompt, skip=skip)
    whole = backend.decode(prompt + token_ids, skip_special_tokens=skip)
    assert before + shown(decoder, prompt, cut(token_ids, places), skip=skip) == whole


@pytest.mark.parametrize("name", BY_BYTES)
@given(data=st.data(), places=CUTS, skip=st.booleans())
@settings(max_examples=examples(150), deadline=None)
def test_a_byte_that_is_no_character_does_not_spoil_its_neighbours(
    name: str, data: Any, places: list[int], skip: bool
) -> None:
    """The library would take back characters that have been given out already; but for that, it is the whole text."""
    backend, decoder = BY_BYTES[name], DECODERS[name]
    table = decoder.token_table
    assert table is not None
    prompt, token_ids = backend.encode("the").ids, data.draw(ids_of(name, 50))
    text = shown(decoder, prompt, cut(token_ids, places), skip=skip)
    assert text == by_runs(table, token_ids, skip=skip)
    whole = backend.decode(prompt + token_ids, skip_special_tokens=skip)
    if REPLACEMENT not in whole:
        assert backend.decode(prompt, skip_special_tokens=skip) + text == whole


@pytest.mark.parametrize("name", BY_BYTES)
@given(text=st.text(SCRIPTS, max_size=40), prompt=st.text("a▁b ", max_size=4), places=CUTS)
@settings(deadline=None)
def test_a_text_by_bytes_is_the_whole_text(name: str, text: str, prompt: str, places: list[int]) -> None:
    """Also where nothing is before it: then the library drops a space, or does not."""
    backend, decoder = BY_BYTES[name], DECODERS[name]
    before, token_ids = backend.encode(prompt).ids, backend.encode(text, add_special_tokens=False).ids
    whole = backend.decode(before + token_ids)
    assert backend.decode(before) + shown(decoder, before, cut(token_ids, places)) == whole


@pytest.mark.parametrize("name", WINDOWED)
@given(data=st.data(), places=CUTS, text=st.text(SCRIPTS, max_size=30))
@settings(deadline=None)
def test_decoders_that_look_around_are_followed_by_a_window(name: str, data: Any, places: list[int], text: str) -> None:
    backend, decoder = WINDOWED[name], DECODERS[name]
    assert decoder.token_table is None
    prompt, token_ids = backend.encode("the").ids, data.draw(ids_of(name, 40))
    one_by_one = shown(decoder, prompt, [[token_id] for token_id in token_ids])
    assert shown(decoder, prompt, cut(token_ids, places)) == one_by_one
    special = [id_of(backend, name) for name in SPECIAL]
    written = backend.encode(text, add_special_tokens=False).ids
    for place in places:
        written.insert(place, special[place % len(special)])
    assert backend.decode(prompt) + shown(decoder, prompt, cut(written, places)) == backend.decode(prompt + written)


def test_the_tokenizer_of_the_tiny_model(tiny_backend: tokenizers.Tokenizer) -> None:
    decoder = WithTable(tiny_backend)
    assert decoder.token_table is not None
    for text in TEXTS:
        token_ids = tiny_backend.encode(text, add_special_tokens=False).ids
        assert shown(decoder, [1], [[token_id] for token_id in token_ids]) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["demo", "trained", "llama", "gemma"])
@pytest.mark.parametrize("kind", [Plain, WithTable])
def test_token_by_token_no_half_character_is_shown(kind: type[Plain], name: str, text: str) -> None:
    backend = EVERY[name]
    prompt = backend.encode("the", add_special_tokens=False).ids
    token_ids = backend.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(kind(backend), prompt)
    pieces = [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.flush()]
    whole = backend.decode(prompt + token_ids)[len(backend.decode(prompt)) :]
    assert "".join(pieces) == whole
    assert "".join(pieces).count(REPLACEMENT) == text.count(REPLACEMENT)


@pytest.mark.parametrize("kind", [Plain, WithTable])
def test_a_character_cut_off_at_the_end_shows_as_replacement(kind: type[Plain]) -> None:
    token_ids = LLAMA.encode("a🙂", add_special_tokens=False).ids[:-1]
    detokenizer = Detokenizer(kind(LLAMA), [])
    pieces = [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.flush()]
    assert pieces[-1] == REPLACEMENT * 3
    assert "".join(pieces[:-1]).strip() == "a"


@pytest.mark.parametrize("kind", [Plain, WithTable])
def test_a_prompt_that_ends_inside_a_character(kind: type[Plain]) -> None:
    whole = LLAMA.encode("a🙂b", add_special_tokens=False).ids
    assert shown(kind(LLAMA), whole[:3], [[token_id] for token_id in whole[3:]]) == "🙂b"


@pytest.mark.parametrize("kind", [Plain, WithTable])
def test_prompts_own_characters_are_never_shown_again(kind: type[Plain]) -> None:
    """A run of bytes is replaced as a whole while its end is unfinished, also the part that is the prompt's."""
    whole = LLAMA.encode("a🙂🙃b", add_special_tokens=False).ids
    for cut_place in range(2, len(whole)):
        text = shown(kind(LLAMA), whole[:cut_place], [[token_id] for token_id in whole[cut_place:]])
        assert LLAMA.decode(whole).endswith(text)
        assert REPLACEMENT not in text
        assert text.endswith("b")


def test_a_prompt_of_special_tokens_is_a_texts_beginning() -> None:
    """A space is dropped there, and only there; what is skipped is no text."""
    the = id_of(LLAMA, "▁the")
    special = [id_of(LLAMA, name) for name in SPECIAL]
    for prompt in ([], special, special * TABLE_CONTEXT_TOKENS):
        assert shown(DECODERS["llama"], prompt, [[the], special, [the]]) == "the the"
        assert shown(DECODERS["llama"], prompt, [[the, *special, the]]) == "the the"
    assert shown(DECODERS["llama"], special, [[the]], skip=False) == " the"
    assert shown(DECODERS["gemma"], special, [[the]]) == " the"


def test_many_tokens_that_end_inside_a_character_wait_for_it() -> None:
    """With a window too: that they come together does not make a run of bytes of them."""
    smile = LLAMA.encode("🙂", add_special_tokens=False).ids[-4:]
    many = [id_of(LLAMA, "a")] * 2 * WINDOW_TOKENS_MAX
    for decoder in (Plain(LLAMA), DECODERS["llama"]):
        assert shown(decoder, many, [many + smile[:3], smile[3:]]) == "a" * len(many) + "🙂"


def test_bytes_that_never_become_text_do_not_stall_a_window() -> None:
    plain = Plain(DEMO)
    invalid = DEMO.token_to_id("ÿ")  # byte 0xFF in the byte-level alphabet
    assert invalid is not None
    detokenizer = Detokenizer(plain, [])
    text = "".join(detokenizer.push([invalid]) for _ in range(1000))
    assert len(text) >= 1000 - WINDOW_TOKENS_MAX - 1
    assert plain.longest_tokens <= 2 * (WINDOW_TOKENS_MAX + 1)


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xF0, 0xE0, 0xC2])
@pytest.mark.parametrize("name", ["demo", "llama"])
def test_ten_thousand_bytes_that_are_no_text_are_given_out_at_once(name: str, byte: int) -> None:
    """With a table nothing is decoded, and nothing grows: three bytes of a character are all that is kept."""
    decoder = DECODERS[name]
    assert decoder.token_table is not None
    token_id = decoder.token_table.whole.index(bytes([byte]))
    detokenizer = Detokenizer(decoder, [token_id])
    decoder.longest_tokens = 0
    given = 0
    for pushed in range(1, 10_001):
        given += len(detokenizer.push((token_id,)))
        assert len(detokenizer._pending) <= 3
        assert given >= pushed - 3
    assert decoder.longest_tokens == 0
    state = (detokenizer, detokenizer._pending, *(getattr(detokenizer, name) for name in ("_errors", "_window")))
    assert sum(map(sys.getsizeof, state)) < 1_024


def test_work_for_a_token_does_not_grow_with_the_stream() -> None:
    plain = Plain(DEMO)
    detokenizer = Detokenizer(plain, DEMO.encode("x " * 500).ids)
    for token_id in DEMO.encode("Once upon a time there was a fox. " * 100).ids:
        detokenizer.push([token_id])
    assert plain.longest_tokens < 20


def test_special_tokens_do_not_make_a_window_grow() -> None:
    plain = Plain(WORDPIECE)
    detokenizer = Detokenizer(plain, WORDPIECE.encode("the fox").ids)
    user, fox = (id_of(WORDPIECE, name) for name in ("<|user|>", "fox"))
    assert "".join(detokenizer.push([user]) for _ in range(1_000)) == ""
    assert detokenizer.push([fox]) == " fox"
    assert plain.longest_tokens < 2 * WINDOW_TOKENS_MAX


@pytest.mark.parametrize("kind", [Plain, WithTable])
def test_special_tokens_have_no_text_unless_asked_for(kind: type[Plain]) -> None:
    end = id_of(DEMO, "<|end|>")
    assert shown(kind(DEMO), [], [[end], [end]]) == ""
    assert shown(kind(DEMO), [], [[end]], skip=False) == "<|end|>"


def test_ids_that_a_tokenizer_lacks_have_no_text() -> None:
    """Models have more rows than their tokenizers have tokens; a negative id must not count from the end."""
    a = id_of(DEMO, "a")
    beyond = token_count(DEMO)
    assert shown(DECODERS["demo"], [beyond, -1], [[beyond], [-1], [a, beyond, -1, a], [beyond, a]]) == "aaa"


def decoded(*steps: Any) -> tokenizers.Tokenizer:
    backend = by_bytes()
    backend.decoder = decoders.Sequence(list(steps)) if steps else None
    return backend


REPLACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()


@pytest.mark.parametrize(
    "backend",
    [
        decoded(),
        decoded(REPLACE, BYTES, FUSE, decoders.Strip(" ", 0, 1)),
        decoded(REPLACE, BYTES, FUSE, decoders.Strip(" ", 2, 0)),
        decoded(REPLACE, BYTES, decoders.Strip(" ", 1, 0), FUSE),
        decoded(REPLACE, BYTES, FUSE, decoders.Replace("the", "a")),
        decoded(decoders.Replace(tokenizers.Regex("▁+"), " "), BYTES, FUSE),
        decoded(BYTES, REPLACE, FUSE),
        decoded(decoders.ByteLevel(), decoders.Strip(" ", 1, 0)),
        decoded(decoders.CTC()),
        UNIGRAM_BYTES,
        WORDPIECE,
        SUFFIXED,
        tokenizers.Tokenizer(models.BPE({"<0x80>": 0, "1": 1}, [])),
    ],
)
def test_a_decoder_that_does_more_than_join_has_no_table(backend: tokenizers.Tokenizer) -> None:
    assert TokenTable.read(backend, token_count(backend)) is None


def test_a_token_without_a_text_ends_a_run_of_bytes_and_so_has_no_table() -> None:
    backend = decoded(decoders.Replace("b", ""), BYTES, FUSE)
    assert TokenTable.read(backend, token_count(backend)) is None


@pytest.mark.parametrize(
    ("backend", "errors", "drops"),
    [
        (TRAINED, "replace", False),
        (LLAMA, "tandem.replace_each_byte", True),
        (GEMMA, "tandem.replace_each_byte", False),
        (METASPACE, "tandem.replace_each_byte", True),
        (NEVER_PREPENDED, "tandem.replace_each_byte", False),
        (decoded(FUSE), "tandem.replace_each_byte", False),
    ],
)
def test_a_decoder_that_joins_has_a_table(backend: tokenizers.Tokenizer, errors: str, drops: bool) -> None:
    table = TokenTable.read(backend, token_count(backend))
    assert table is not None
    assert (table.errors, table.drops_first_space) == (errors, drops)
    special = [id_of(backend, name) for name in SPECIAL]
    assert [table.shown[i] for i in special] == ["", "", ""]
    assert [table.whole[i] for i in special] == list(SPECIAL)
