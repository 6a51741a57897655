"""Tokenizer and chat template against transformers, which takes seconds to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.preparation.chat_template import ChatTemplate
from tandem_frontend.preparation.tokenizer import Tokenizer

from tandem.testing.tool_model import link_tool_model
from tests.unit.support.parser_texts import TOOLS
from tests.unit.support.tool_history import ARGUMENTS, history

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


@pytest.mark.parametrize("thinking", [True, False])
def test_a_template_with_tools_is_rendered_as_transformers_does(tmp_path: Path, thinking: bool) -> None:
    from transformers import AutoTokenizer

    model = link_tool_model(tmp_path / "model", DEMO)
    template = ChatTemplate.read(model)
    assert template is not None
    ours = template.render(
        history(json.dumps(ARGUMENTS, ensure_ascii=False)),
        add_generation_prompt=True,
        tools=TOOLS,
        enable_thinking=thinking,
    )
    theirs = history(ARGUMENTS)
    theirs[1]["content"], theirs[2]["content"] = "", "18 °C"
    assert ours == AutoTokenizer.from_pretrained(model).apply_chat_template(
        theirs, tools=TOOLS, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert ours.endswith("<think>\n") is thinking
    assert '"name": "add"' in ours
    assert '{"name": "weather", "arguments": {"city": "Köln", "days": 3}}' in ours
