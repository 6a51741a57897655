"""SGLang's parsers behind `Pieces`: every format under every split of the text; malformed text is not lost."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.sglang.environment import STANDINS
from tests.unit.support.examples import examples
from tests.unit.support.parser_texts import CALLS, JSON_ARRAY, LEAD, TEXTS, TOOLS, summed

if importlib.util.find_spec("sglang") is None and not os.environ.get("CI"):
    pytest.skip("sglang is not installed here (requirements/cpu-engine.txt)", allow_module_level=True)
sys.path.append(str(STANDINS))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tandem.engine.sglang.parsing.host import Host, wanted
    from tandem.engine.sglang.parsing.reasoning import is_inside
    from tandem.engine.sglang.parsing.stream import Formats

pytestmark = [pytest.mark.engine_sglang, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

NOTHING: dict[str, Any] = {"prompt": "", "template_kwargs": {}, "previous_calls": 0, "parallel": True}
Sum = tuple[str, str, list[tuple[str, Any]]]


def parse(
    tool_parser: str | None,
    pieces: list[str],
    *,
    reasoning: str | None = None,
    prompt: str = "",
    choice: Any = "auto",
    tools: Any = TOOLS,
    complete: bool = True,
) -> Sum:
    """What a stream adds up to; arguments as objects."""
    message = {**NOTHING, "tools": tools, "tool_choice": choice, "prompt": prompt}
    stream = Formats(tool_parser, reasoning, None).open(wanted(message))
    deltas = [delta for piece in pieces for delta in stream.feed(piece)]
    content, thought, calls = summed(deltas + stream.close(complete=complete))
    return content, thought, [(name, json.loads(text) if complete else text) for name, text in calls]


def cut(text: str, *places: int) -> list[str]:
    edges = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_the_same_under_every_cutting(name: str) -> None:
    text, parser = TEXTS[name], name.split(",")[0]
    expected = (LEAD if text.startswith(LEAD) else "", "", CALLS)
    assert parse(parser, [text]) == expected
    assert parse(parser, list(text)) == expected
    for place in range(1, len(text)):
        assert parse(parser, cut(text, place)) == expected, f"cut at {place}: {text[:place]!r}"


@given(data=st.data())
@settings(max_examples=examples(150), deadline=None)
def test_calls_are_the_same_in_random_chunks(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    text = TEXTS[name]
    places = data.draw(st.lists(st.integers(1, len(text) - 1), max_size=40))
    assert parse(name.split(",")[0], cut(text, *places)) == (LEAD if text.startswith(LEAD) else "", "", CALLS)


@given(places=st.lists(st.integers(1, len(JSON_ARRAY) - 1), max_size=40))
@settings(max_examples=examples(60), deadline=None)
@pytest.mark.parametrize("parser", [None, "pythonic"])
def test_a_forced_call_is_a_json_array_where_the_format_has_no_grammar(parser: str | None, places: list[int]) -> None:
    assert parse(parser, cut(JSON_ARRAY, *places), choice="required") == ("", "", CALLS)


@pytest.mark.parametrize(
    ("prompt", "begin"), [("<|assistant|><think>\n", ""), ("<|assistant|>", "<think>"), ("<|assistant|>", "<think>\n")]
)
def test_reasoning_then_content_then_calls(prompt: str, begin: str) -> None:
    text = f"{begin}Hm, <b>1 < 2</b>.</think>\n\n{TEXTS['qwen25']}"
    for place in range(1, len(text)):
        content, thought, calls = parse("qwen25", cut(text, place), reasoning="qwen3", prompt=prompt)
        assert thought.strip() == "Hm, <b>1 < 2</b>.", f"cut at {place}: {text[:place]!r}"
        assert (content.strip(), calls) == (LEAD, CALLS), f"cut at {place}: {text[:place]!r}"


@pytest.mark.parametrize("reasoning", ["deepseek-r1", "qwen3", "qwen3-thinking", "glm45", "kimi_k2", "nemotron_3"])
def test_a_prompt_that_has_closed_the_reasoning(reasoning: str) -> None:
    prompt = "<|assistant|><think>\n\n</think>\n\n"
    assert parse(None, ["Just ", "this."], reasoning=reasoning, prompt=prompt, tools=[]) == ("Just this.", "", [])


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("a<think>\n", True),
        ("a<think>b</think>\n\n", False),
        ("a<think>b", None),
        ("", None),
        ("<think>a</think>b", None),
    ],
)
def test_the_prompt_knows_whether_the_model_thinks(prompt: str, inside: bool | None) -> None:
    assert is_inside(prompt, "<think>", "</think>") is inside


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("qwen25", '<tool_call>\n{"name": "unheard_of", "arguments": {"x": 1}}\n</tool_call>'),
        ("qwen25", "<tool_call>\nweather, please\n</tool_call>"),
        ("hermes", "<tool_call>not JSON</tool_call>"),
        ("llama3", "Use {x} for it, and more words."),
        ("mistral", "a[0] = b[1]; [TOOL_CALL is not a marker"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": '),
        ("glm45", "<tool_call> and then nothing"),
        ("deepseekv3", "<｜tool▁calls▁begin｜> and then nothing"),
        ("pythonic", "[weather, please]"),
    ],
)
def test_text_that_is_no_tool_call_is_not_lost(parser: str, text: str) -> None:
    for pieces in ([text], list(text), cut(text, len(text) // 2)):
        content, _, calls = parse(parser, pieces, complete=False)
        words = [word for word in text.replace('"', " ").split() if word.isalpha()]
        seen = content + " ".join(name + arguments for name, arguments in calls)
        assert all(word in seen for word in words), (content, calls)


@pytest.mark.parametrize(
    "text", ["a < b, x <= y and 1<2, [A] [b] {c}", "  two  spaces \n\n and an end \n", "<", "[", "<a"]
)
@pytest.mark.parametrize("parser", ["qwen25", "hermes", "mistral", "qwen3_coder", "deepseekv3", "kimi_k2", "glm45"])
def test_plain_text_comes_out_as_it_is(parser: str, text: str) -> None:
    for pieces in ([text], list(text)):
        assert parse(parser, pieces) == (text, "", [])


def test_plain_words_are_not_held_back() -> None:
    message = {**NOTHING, "tools": TOOLS, "tool_choice": "auto"}
    stream = Formats("qwen25", "qwen3", None).open(wanted(message))
    for chunk in ("Hello", " wor", "ld", " and", " more"):
        shown = summed(stream.feed(chunk))[0]
    assert shown == " more"


def test_a_call_without_arguments_has_an_empty_object() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    assert parse("qwen25", [text]) == ("", "", [("add", {})])


def test_a_call_that_was_cut_off_stays_cut_off() -> None:
    text = TEXTS["qwen25"][: TEXTS["qwen25"].index("days")]
    content, _, calls = parse("qwen25", [text], complete=False)
    assert content == LEAD
    [(name, arguments)] = calls
    assert name == "weather"
    assert arguments.startswith('{"city": "K')
    assert "}" not in arguments


def test_a_call_whose_arguments_are_broken_is_still_a_call() -> None:
    """As SGLang has it: what was read of the arguments."""
    text = '<tool_call>\n{"name": "weather", "arguments": {"days": 3, "city": \n</tool_call>'
    for pieces in ([text], list(text)):
        assert parse("qwen25", pieces) == ("", "", [("weather", {"days": 3})])


def test_a_named_choice_knows_no_other_tool() -> None:
    named = {"type": "function", "function": {"name": "add"}}
    grammar = Formats("qwen25", None, None).grammar(wanted({**NOTHING, "tools": TOOLS, "tool_choice": named}))
    assert grammar is not None
    assert grammar["kind"] == "structural_tag"
    assert "add" in grammar["grammar"]
    assert "weather" not in grammar["grammar"]


@pytest.mark.parametrize(
    ("parser", "choice", "strict", "kind"),
    [
        (None, "required", False, "json_schema"),
        ("pythonic", "required", False, "json_schema"),
        ("qwen25", "required", False, "structural_tag"),
        ("qwen3_coder", "required", False, "structural_tag"),
        ("glm47", "auto", False, "ebnf"),
        ("hunyuan", "required", False, None),
        ("qwen25", "auto", False, None),
        ("qwen25", "auto", True, "structural_tag"),
        (None, "auto", True, None),
    ],
)
def test_the_grammar_is_sglangs_own(parser: str | None, choice: str, strict: bool, kind: str | None) -> None:
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in TOOLS]
    grammar = Formats(parser, None, None).grammar(wanted({**NOTHING, "tools": tools, "tool_choice": choice}))
    assert (None if grammar is None else grammar["kind"]) == kind
    if kind in ("json_schema", "structural_tag"):
        assert grammar is not None
        assert "weather" in json.dumps(json.loads(grammar["grammar"]))


def test_a_model_may_think_before_a_forced_call_where_the_grammar_lets_it() -> None:
    message = {**NOTHING, "tools": TOOLS, "tool_choice": "required", "prompt": "<think>\n"}
    grammar = Formats("qwen3_coder", "qwen3", None).grammar(wanted(message))
    assert grammar is not None
    assert "</think>" in grammar["grammar"]
    text = "Hm.</think>\n\n" + TEXTS["qwen3_coder"].removeprefix(LEAD + "\n")
    sums = parse("qwen3_coder", list(text), reasoning="qwen3", prompt="<think>\n", choice="required")
    assert sums == ("", "Hm.", CALLS)


def test_kimis_ids_count_on() -> None:
    message = {**NOTHING, "tools": TOOLS, "tool_choice": "auto", "previous_calls": 4}
    stream = Formats("kimi_k2", None, None).open(wanted(message))
    deltas = stream.feed(TEXTS["kimi_k2"]) + stream.close(complete=True)
    assert [delta[2] for delta in deltas if delta[0] == "s"] == ["functions.weather:4", "functions.add:5"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOLS[0], {"type": "function", "function": {"name": ""}}]}, "tools[1].function.name"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(change: dict[str, Any], field: str) -> None:
    host = Host(Formats("qwen25", None, None))
    response = host.handle({"op": "open", "id": 1, **NOTHING, "tools": TOOLS, "tool_choice": "auto", **change})
    assert response["field"] == field
    assert host.handle({"op": "count"}) == {"streams": 0}


def test_an_exception_is_one_streams() -> None:
    host = Host(Formats("qwen25", None, None))
    for number in (1, 2):
        host.handle({"op": "open", "id": number, **NOTHING, "tools": TOOLS, "tool_choice": "auto"})
    assert "error" in host.handle({"op": "feed", "id": 1, "text": 5})
    assert host.handle({"op": "count"}) == {"streams": 1}
    assert host.handle({"op": "feed", "id": 2, "text": "yes "})["deltas"] == [["c", "yes"]]
    assert "error" in host.handle({"op": "feed", "id": 1, "text": "no"})
    assert "error" in host.handle({"op": "no such", "id": 2})
