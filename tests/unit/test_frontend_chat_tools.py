"""Tools, tool calls and their answers in chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tandem_frontend.preparation.chat_template import ChatTemplate

from tandem.errors import InvalidRequest
from tandem.testing.tool_model import link_tool_model
from tests.unit.support.parser_texts import TOOLS
from tests.unit.support.tool_history import ARGUMENTS, history

DEMO = Path(__file__).parents[2] / "models" / "tandem-demo"


@pytest.fixture
def template(tmp_path: Path) -> ChatTemplate:
    found = ChatTemplate.read(link_tool_model(tmp_path / "model", DEMO))
    assert found is not None
    return found


def write(directory: Path, source: Any) -> ChatTemplate:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    template = ChatTemplate.read(directory)
    assert template is not None
    return template


def test_whether_a_template_takes_tools(template: ChatTemplate, tmp_path: Path) -> None:
    assert template.takes_tools
    demo = ChatTemplate.read(DEMO)
    assert demo is not None
    assert not demo.takes_tools
    assert not write(tmp_path, "{# tools #}{% set tools = [] %}{{ tools }}{{ 'tools' }}").takes_tools
    assert write(tmp_path, "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}").takes_tools
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    assert write(tmp_path, named).takes_tools
    assert write(tmp_path, named).render([], add_generation_prompt=True, tools=TOOLS) == "2"
    assert write(tmp_path, named).render([], add_generation_prompt=True) == "plain"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ messages[1].tool_calls[0].function.arguments.city }}", "Köln"),
        ("{{ 'args ' + messages[1].tool_calls[0].function.arguments }}", 'args {"city": "Köln", "days": 3}'),
        ("{{ messages[1].content + '|' + messages[2].content }}", "|18 °C"),
        ("{{ 'tool ' + tools[0].name }}", "tool weather"),
        (
            "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %} {% endfor %}",
            "user assistant tool user ",
        ),
        ("{{ cls_token is defined }}", "False"),
    ],
    ids=["an object", "text", "content", "functions without their wrapper", "marks for training", "special tokens"],
)
def test_templates_of_every_taste(tmp_path: Path, source: str, rendered: str) -> None:
    given = history(json.dumps(ARGUMENTS, ensure_ascii=False))
    before = json.dumps(given)
    assert write(tmp_path, source).render(given, add_generation_prompt=True, tools=TOOLS) == rendered
    assert json.dumps(given) == before, "the request's own messages are not changed"


def test_empty_arguments_are_an_empty_object(tmp_path: Path) -> None:
    template = write(tmp_path, "{{ messages[1].tool_calls[0].function.arguments | tojson }}")
    assert template.render(history(""), add_generation_prompt=True) == "{}"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"text"', "[" * 100_000])
def test_arguments_that_are_no_object_are_named(template: ChatTemplate, arguments: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        template.render(history(arguments), add_generation_prompt=True)
    assert refused.value.field == "messages[1].tool_calls[0].function.arguments"


def test_a_chat_that_no_variant_renders_fails_with_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="chat template failed"):
        write(tmp_path, "{{ 1 + messages[0].content }}").render(history("{}"), add_generation_prompt=True, tools=TOOLS)
