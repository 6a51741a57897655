"""The demo model can be made again: corpus, tokenizer and training steps are those that its card and log name."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem.cli.up import FIRST_PROMPT
from tools.demo_model import lexicon
from tools.demo_model.corpus import documents
from tools.demo_model.facts import recall_prompts
from tools.demo_model.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]
DEMO_MODEL = REPOSITORY / "models" / "tandem-demo"
TOKENIZER = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
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


def test_transformers_loads_the_demo_model_and_it_stops() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    chat = [{"role": "user", "content": FIRST_PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        reply = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :].tolist()
    assert tokenizer.decode(reply) == "Mia hid the red key in the old barn.<|end|>"


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_corpus_is_the_one_of_the_training(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    found = subprocess.run(
        [sys.executable, "-c", CORPUS_PROGRAM], cwd=REPOSITORY, env=environment, check=True, capture_output=True
    )
    assert found.stdout.decode().strip() == CORPUS_DIGEST


def test_the_tokenizer_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tools.demo_model.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (DEMO_MODEL / file.name).read_bytes(), file.name


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


def test_recall_prompts_ask_for_no_fact_of_the_training() -> None:
    sentence = re.compile(rf"({'|'.join(lexicon.NAMES)}) (?:{'|'.join(lexicon.VERBS)}) the \w+ (\w+) ")
    trained = set[tuple[str, ...]]()
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
