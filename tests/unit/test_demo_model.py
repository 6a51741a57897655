"""The model in models/tandem-demo: whole, small, spoken to in any script, and still what its card and recipe say.

Fast. What needs the real engine, recall through a pair and its collapse without transfer included, is in
tests/integration/test_sglang_cluster.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import Environment
from tokenizers import Tokenizer

from tandem.domain.checkpoint import read_checkpoint
from tandem.testing.fake_model import write_fake_model
from tools.demo_model import lexicon, stories, wellformed
from tools.demo_model.corpus import documents
from tools.demo_model.facts import recall_prompts
from tools.demo_model.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"
CARD = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
MODEL_BYTES_MAX = 16 * 2**20
CONTEXT_TOKENS_MIN = 2048
CORPUS_DIGEST = "646cde5084ac25cb35817cbb6a5d51b88ef0ebd9b3db180ef54c8a8c133a141b"
"""SHA-256 over the first 200 documents of every phase of the recipe. Another one means: another model, train again."""
CORPUS_PROGRAM = """
import hashlib, itertools
from tools.demo_model.corpus import documents
from tools.demo_model.recipe import Recipe
recipe, digest = Recipe(), hashlib.sha256()
for index, phase in enumerate(recipe.phases):
    for document in itertools.islice(documents(f"{recipe.seed}-{index}", phase.mix), 200):
        digest.update(repr(document).encode())
print(digest.hexdigest())
"""


def json_of(name: str) -> Any:
    return json.loads((DEMO_MODEL / name).read_text(encoding="utf-8"))


def count_tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


def test_it_is_small_and_its_context_is_long() -> None:
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


def test_transformers_loads_it_and_it_answers_and_ends() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    chat = [{"role": "user", "content": "Mia hid the red key in the old barn. Where did Mia hide the red key?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        reply = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(reply) == "Mia hid the red key in the old barn.<|end|>"


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_corpus_is_the_one_it_was_trained_on(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    found = subprocess.run(
        [sys.executable, "-c", CORPUS_PROGRAM], cwd=REPOSITORY, env=environment, check=True, capture_output=True
    )
    assert found.stdout.decode().strip() == CORPUS_DIGEST


def test_another_seed_is_another_corpus() -> None:
    mix = Recipe().phases[0].mix
    one, same, other = (list(itertools.islice(documents(seed, mix), 20)) for seed in ("7-0", "7-0", "8-0"))
    assert one == same != other


def test_the_tokenizer_is_made_again_byte_by_byte(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tools.demo_model.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (DEMO_MODEL / file.name).read_bytes(), file.name


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


def test_a_run_too_far_from_the_log_fails_the_check() -> None:
    pytest.importorskip("transformers")
    from tools.demo_model.train import CHECK_TOLERANCE, LogLine, check

    published = [LogLine(**line) for line in json_of("training_log.json")]
    assert check(published[:8], DEMO_MODEL / "training_log.json")
    for off, passes in ((0.9 * CHECK_TOLERANCE, True), (1.1 * CHECK_TOLERANCE, False)):
        moved = dataclasses.replace(published[50], loss=published[50].loss + off)
        assert check([*published[:50], moved], DEMO_MODEL / "training_log.json") == passes
    assert not check([], DEMO_MODEL / "training_log.json")


def test_a_nudge_is_one_rounding_step_of_every_matrix() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tools.demo_model.tokenizer import train_tokenizer
    from tools.demo_model.train import build_model, nudge

    tokenizer = train_tokenizer()
    one, other = build_model(Recipe(), tokenizer), build_model(Recipe(), tokenizer)
    nudge(other, 1)
    for before, after in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(before, after, rtol=1e-6, atol=0)
        assert before.ndim == 1 or not torch.equal(before, after)


def test_recall_asks_what_no_training_fact_holds() -> None:
    sentence = re.compile(rf"({'|'.join(lexicon.NAMES)}) (?:{'|'.join(lexicon.VERBS)}) the \w+ (\w+) ")
    trained = set()
    for index, phase in enumerate(Recipe().phases):
        for document in itertools.islice(documents(f"7-{index}", phase.mix), 1000):
            trained.update(pair for turn in document for pair in sentence.findall(turn.text))
    prompts = list(recall_prompts(1, 200, 100, 300, count_tokens))
    asked = {sentence.findall(prompt.answer)[0] for prompt in prompts}
    assert len(trained) > 2000
    assert not asked & trained
    for prompt in prompts:
        content = prompt.messages[0]["content"]
        assert content.count(prompt.answer) == 1
        assert 100 <= prompt.distance_tokens <= 300
        between = content.split(prompt.answer)[1].rsplit(". ", 1)[0] + "."
        assert abs(count_tokens(between) - prompt.distance_tokens) <= 2


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


def foreign_tokenizer(model: Path, tmp_path: Path) -> None:
    shutil.copy(write_fake_model(tmp_path / "other", vocabulary_size=512) / "tokenizer.json", model)


def larger_tokenizer(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1535}))


def larger_vocabulary(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1600}))


def flipped_header(model: Path, tmp_path: Path) -> None:
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(20)
        stream.write(b"\xff\xff\xff")


def truncated(model: Path, tmp_path: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "name", "sentence"),
    [
        (truncated, "model.safetensors", "is truncated or damaged"),
        (flipped_header, "model.safetensors", "is damaged: its header cannot be parsed"),
        (foreign_tokenizer, "tokenizer.json", "does not match the model: it has 512 tokens for a vocabulary of 1536"),
        (larger_tokenizer, "tokenizer.json", "does not match the model: its token id 1535 is beyond the vocabulary"),
        (larger_vocabulary, "model.safetensors", "does not match config.json: 1536 rows"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("worker", ["tandem_prefill", "tandem_decode"])
def test_a_worker_refuses_to_start(worker: str, damage: Any, name: str, sentence: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    damage(model, tmp_path)
    command = [sys.executable, "-m", worker, "--registry=127.0.0.1:1", f"--model={model}", "--engine=simulated"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1
    assert f"{model / name} {sentence}" in last
    assert "Traceback" not in found.stderr
