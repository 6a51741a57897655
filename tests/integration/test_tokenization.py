"""Tokenizer and chat template against transformers, on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.preparation.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "models" / "tandem-demo"
CHATS = [
    [{"role": "user", "content": "Where did Mia hide the red key?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once."},
        {"role": "user", "content": "東京 🙂\n\tmore"},
    ],
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same tokenizer in transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("begin_answer", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "system", "turns"])
async def test_chats_are_rendered_as_transformers_does(reference: Any, chat: list[Any], begin_answer: bool) -> None:
    tokenizer = Tokenizer.open(DEMO)
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.render(chat, add_generation_prompt=begin_answer)
    assert text == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=begin_answer)
    ids = reference.apply_chat_template(chat, add_generation_prompt=begin_answer, return_dict=True)["input_ids"]
    assert await tokenizer.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("text", ["Once upon a time", "", "東京 🙂 e\u0301", "a <|end|> b", " \n"])
async def test_texts_are_cut_as_transformers_does(reference: Any, text: str) -> None:
    assert await Tokenizer.open(DEMO).encode(text, add_special_tokens=True) == reference.encode(text)
