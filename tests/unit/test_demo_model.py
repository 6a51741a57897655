"""The model in models/tandem-demo: whole, small, spoken to in any script, and still what its card and recipe say.

What needs the real engine, recall through a pair and its collapse without transfer included, is in
tests/integration/test_sglang_cluster.py; that the model can be made again, in test_demo_model_recipe.py beside it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer

from tandem.domain.checkpoint import read_checkpoint
from tools.demo_model import lexicon, stories, wellformed
from tools.demo_model.corpus import documents
from tools.demo_model.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"
CARD = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
MODEL_BYTES_MAX = 16 * 2**20
CONTEXT_TOKENS_MIN = 2048


def json_of(name: str) -> Any:
    return json.loads((DEMO_MODEL / name).read_text(encoding="utf-8"))


def count_tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


def test_the_demo_model_is_small_and_its_context_is_long() -> None:
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= MODEL_BYTES_MAX
    found = read_checkpoint(DEMO_MODEL)
    assert found.context_tokens_max >= CONTEXT_TOKENS_MIN
    assert json_of("tokenizer_config.json")["model_max_length"] == found.context_tokens_max
    assert found.kv_layout == "mha:4x2x64"


def test_the_weights_are_the_published_ones() -> None:
    digest = hashlib.sha256((DEMO_MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert digest in CARD


def test_every_byte_is_a_token() -> None:
    # Byte-level BPE writes each byte as one printable character; no text needs an unknown token.
    pieces = json_of("tokenizer.json")["model"]
    assert sum(len(piece) == 1 for piece in pieces["vocab"]) == 256
    assert pieces["unk_token"] is None


@given(st.text())
@example("Ünïcödé 東京 👩‍👩‍👧 \x00 \u202e \r\n\t  x")
@example("\U0010ffff\ud7ff\ue000\ufffd")
@example("<|end|><|user|> are special, <|endx|> is not")
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_a_turn_has_one_end_and_every_file_names_it() -> None:
    end = TOKENIZER.token_to_id("<|end|>")
    assert read_checkpoint(DEMO_MODEL).eos_token_ids == (end,)
    assert json_of("config.json")["eos_token_id"] == json_of("generation_config.json")["eos_token_id"] == end
    assert json_of("tokenizer_config.json")["eos_token"] == "<|end|>"
    template = Environment(autoescape=False).from_string((DEMO_MODEL / "chat_template.jinja").read_text())
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello!"}]
    rendered = template.render(bos_token="<|bos|>", messages=chat, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|assistant|>"


def test_another_seed_is_another_corpus() -> None:
    mix = Recipe().phases[0].mix
    one, same, other = (list(itertools.islice(documents(seed, mix), 20)) for seed in ("7-0", "7-0", "8-0"))
    assert one == same != other


def test_the_log_is_of_this_recipe_and_the_card_quotes_it() -> None:
    recipe, log = Recipe(), json_of("training_log.json")
    steps = [
        (phase, count) for phase in recipe.phases for count in [phase.row_tokens * phase.row_count] * phase.step_count
    ]
    assert log[-1]["step"] == recipe.step_count
    for line in log:
        assert line["tokens"] == sum(count for _, count in steps[: line["step"]])
        assert line["row_tokens"] == steps[line["step"] - 1][0].row_tokens
    quoted = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d\.\d{4}) \|$", CARD, re.MULTILINE)
    known = {f"{line['step']} {line['tokens']} {line['row_tokens']} {line['loss']:.4f}" for line in log}
    assert len(quoted) > 10
    assert {" ".join(row) for row in quoted} <= known


def test_the_rule_for_names_sees_every_slip() -> None:
    draw = random.Random(5)
    cast = stories.draw_cast(draw, "Mia", "Ben", ("red", "key"))
    story = stories.tell_story(draw, cast)
    assert wellformed.corpus_names_share(5, 200) == 1
    assert wellformed.keeps_names(story, "Mia")
    assert not wellformed.keeps_names(story, "Ada")
    other_pet, other_animal = (
        next(one for one in names if one != kept)
        for names, kept in ((lexicon.PET_NAMES, cast.pet), (lexicon.ANIMALS, cast.animal))
    )
    slips = (("Ben", "Tom"), (cast.pet, other_pet), ("red key", "blue key"), ("red key", "red cup"))
    for kept, slip in slips:
        head, found, tail = story.rpartition(kept)
        assert found
        assert not wellformed.keeps_names(head + slip + tail, "Mia"), slip
    assert not wellformed.keeps_names(f"{story} {cast.pet} the {other_animal} slept.", "Mia")
    span = wellformed.friend_span(story, "Mia")
    assert span.startswith("Ben")
    assert span.count("Ben") == story.count("Ben")
