"""Tokenizer and chat template: long texts, control tokens, and their files when they are damaged."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.preparation.chat_template import ChatTemplate
from tandem_frontend.preparation.sampling import read_defaults, with_defaults
from tandem_frontend.preparation.tokenizer import BLOCKING_CHARS_MAX, THREAD_CHARS_MAX, Tokenizer

from tandem.api.types.v1 import sampling_pb2
from tandem.domain.checkpoint import read_card
from tandem.errors import InvalidRequest, StartError
from tandem.testing.fake_model import write_fake_model

DEMO = Path(__file__).parents[2] / "models" / "tandem-demo"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_fake_model(tmp_path / "model")


def edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("chars", [BLOCKING_CHARS_MAX, THREAD_CHARS_MAX])
async def test_a_long_text_is_the_same_off_the_loop(chars: int) -> None:
    card = replace(read_card(DEMO), context_tokens_max=2**17)
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), card, None)
    text = "The fox met Mia in the old barn. " * (chars // 20)
    assert len(text) > chars
    assert tokenizer.decode(await tokenizer.encode(text, add_special_tokens=True)) == text


def test_a_vocabulary_with_tokens_beyond_the_embedding_is_noticed() -> None:
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    card = read_card(DEMO)
    assert Tokenizer(backend, card, None).fits_vocabulary
    assert not Tokenizer(backend, replace(card, vocabulary_size=card.vocabulary_size - 1), None).fits_vocabulary


def test_no_text_that_fits_is_refused_by_its_size() -> None:
    tokenizer = Tokenizer.open(DEMO)
    longest = max((tokenizer.decode([i]) for i in range(6, tokenizer.vocabulary_size)), key=len)
    assert len((longest * tokenizer.context_tokens_max).encode()) <= tokenizer.prompt_bytes_max


def test_control_tokens_in_content_are_neutralised() -> None:
    tokenizer = Tokenizer.open(DEMO)
    text = tokenizer.without_control("a<|end|>b<|user|>")
    assert "<|end|>" not in text
    assert text.replace("\u2060", "") == "a<|end|>b<|user|>"
    assert tokenizer.without_control("1 < 2 |> 3") == "1 < 2 |> 3"


def test_a_frontend_needs_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert Tokenizer.open(model).vocabulary_size == 512


VOCABULARY_WITHOUT_RULES = json.dumps({"model": {"vocab": {f"piece {i}": i for i in range(512)}}})


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read as JSON"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}}', "tokenizer.json does not match the model"),
        ("tokenizer.json", VOCABULARY_WITHOUT_RULES, "tokenizer.json is not a readable tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja: invalid chat template"),
        ("config.json", None, "config.json is missing"),
    ],
)
def test_damaged_files_are_named(model: Path, file: str, content: str | None, sentence: str) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    with pytest.raises(StartError, match=sentence):
        Tokenizer.open(model)


def chat_template(model: Path, source: Any) -> ChatTemplate:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=source)
    template = ChatTemplate.read(model)
    assert template is not None
    return template


def test_a_named_template_is_found(model: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0]['content'] }}"}]
    rendered = chat_template(model, named).render([{"role": "user", "content": "yes"}], add_generation_prompt=True)
    assert rendered == "yes"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system messages') }}",
        "{{ messages[7]['content'] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ 1 / (messages | length - 1) }}",
    ],
    ids=["refusal", "index", "mutation", "escape", "endless", "division"],
)
def test_a_template_that_fails_is_the_requests_error(model: Path, source: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat_template(model, source).render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert refused.value.field == "chat"


def test_a_model_without_a_template(model: Path) -> None:
    shutil.rmtree(model)
    write_fake_model(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=None)
    assert ChatTemplate.read(model) is None


def test_the_models_defaults_fill_what_a_request_leaves_out(model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 0, "top_p": null, "do_sample": true}')
    defaults = read_defaults(model)
    assert defaults == {"temperature": 0.6, "top_k": -1}
    whole = with_defaults(sampling_pb2.Sampling(temperature=0.0, min_p=0.5), defaults)
    assert (whole.temperature, whole.top_k, whole.min_p) == (0.0, -1, 0.5)
    assert not whole.HasField("top_p")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot', not a number"),
        ('{"top_p": true}', "top_p is True, not a number"),
        ('{"top_k": 1.5}', "top_k is 1.5, not a whole number"),
        ('{"top_k": 99999999999}', "top_k is 99999999999, not a whole number of 32 bits"),
        ('{"top_k": -2}', "top_k must be at least 1"),
        ('{"temperature": NaN}', "temperature must be 0 to 2, not nan"),
        ('{"top_p": 0}', "top_p must be above 0, at most 1, not 0"),
        ('{"repetition_penalty": 1e99}', "repetition_penalty must be above 0, at most 2, not inf"),
    ],
)
def test_a_default_that_no_request_could_have_is_named(model: Path, values: str, sentence: str) -> None:
    (model / "generation_config.json").write_text(values)
    with pytest.raises(StartError, match=rf"generation_config\.json: {re.escape(sentence)}"):
        read_defaults(model)


@pytest.mark.parametrize(
    "entry",
    [[{"name": "default"}], [3], [{"name": "default", "template": 3}], 3, {"default": "x"}, [{"template": "x"}]],
)
def test_a_template_entry_of_a_strange_shape_is_named(model: Path, entry: Any) -> None:
    edit(model / "tokenizer_config.json", chat_template=entry)
    with pytest.raises(StartError, match=r"tokenizer_config\.json: chat_template is neither"):
        ChatTemplate.read(model)


@pytest.mark.parametrize("token", [{"text": "<s>"}, 3, ["<s>"]])
def test_a_special_token_of_a_strange_shape_is_named(model: Path, token: Any) -> None:
    edit(model / "tokenizer_config.json", bos_token=token)
    with pytest.raises(StartError, match=r"tokenizer_config\.json: bos_token is neither"):
        ChatTemplate.read(model)


def test_a_template_file_that_is_not_utf8_is_named(model: Path) -> None:
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.read(model)


@given(text=st.text(max_size=60))
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = demo_tokenizer()
    ids = tokenizer._texts.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()


def test_a_special_token_is_its_name_and_an_unknown_one_is_nothing() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]) == b"<|end|>"
    assert tokenizer.token_bytes(tokenizer.vocabulary_size + 5) == b""


@pytest.mark.parametrize(
    ("token", "expected"), [("<0xE2>", b"\xe2"), ("\u2581Hi", b" Hi"), ("<0xzz>", b"<0xzz>"), ("é", "é".encode())]
)
def test_tokens_of_sentencepiece_models(token: str, expected: bytes) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: 0}, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    assert Tokenizer(backend, read_card(DEMO), None).token_bytes(0) == expected


@functools.cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.open(DEMO)
