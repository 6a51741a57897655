"""Two calls of two tools as models write them, by SGLang's name of the format; and what a stream's deltas add up to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {}}},
            },
        },
    },
]
CALLS = [("weather", {"city": "Köln [a, b]", "days": 3}), ("add", {"a": 1, "b": [2]})]
LEAD = "I will look."
WEATHER, ADD = (json.dumps(arguments, ensure_ascii=False) for _, arguments in CALLS)


def _json_tags(opening: str, closing: str, between: str = "\n") -> str:
    calls = (f'{{"name": "{name}", "arguments": {text}}}' for name, text in (("weather", WEATHER), ("add", ADD)))
    return between.join(f"{opening}{call}{closing}" for call in calls)


def _xml(call: str, argument: str, between: str = "\n") -> str:
    """`call` has {name} and {arguments}, `argument` has {key} and {value}."""
    written = []
    for name, arguments in CALLS:
        values = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in arguments.items())
        written.append(call.format(name=name, arguments="".join(argument.format(key=k, value=v) for k, v in values)))
    return between.join(written)


def _dsml(block: str, space: str = "") -> str:
    opening, closing = f"<｜DSML｜{space}", f"</｜DSML｜{space}"

    def argument(key: str, value: Any) -> str:
        kind = "true" if isinstance(value, str) else "false"
        text = value if isinstance(value, str) else json.dumps(value)
        return f'{opening}parameter name="{key}" string="{kind}">{text}{closing}parameter>\n'

    calls = "".join(
        f'{opening}invoke name="{name}">\n{"".join(argument(*pair) for pair in arguments.items())}{closing}invoke>\n'
        for name, arguments in CALLS
    )
    return f"\n\n{opening}{block}>\n{calls}{closing}{block}>"


_FUNCTION_TAGS = "<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>"
_CODER = LEAD + "\n" + _xml(_FUNCTION_TAGS, "<parameter={key}>\n{value}\n</parameter>\n")
_KEYS = "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
_GLM = LEAD + "\n" + _xml("<tool_call>{name}\n{arguments}</tool_call>", _KEYS)
_INVOKE = _xml('<invoke name="{name}">\n{arguments}</invoke>\n', '<parameter name="{key}">{value}</parameter>\n', "")
_STEP = _xml(
    '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">\n{arguments}'
    "</steptml:invoke><｜tool_call_end｜>\n",
    '<steptml:parameter name="{key}">{value}</steptml:parameter>\n',
    "",
)
_QWEN = LEAD + "\n" + _json_tags("<tool_call>\n", "\n</tool_call>")

TEXTS: dict[str, str] = {
    "qwen": _QWEN,
    "qwen25": _QWEN,
    "trinity": _QWEN,
    "hermes": LEAD + "\n" + _json_tags("<tool_call>", "</tool_call>"),
    "llama3": LEAD
    + f'<|python_tag|>{{"name": "weather", "parameters": {WEATHER}}}; {{"name": "add", "parameters": {ADD}}}',
    "mistral": f"{LEAD}[TOOL_CALLS] [{_json_tags('', '', ', ')}]",
    "mistral, compact": f"{LEAD}[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]add[ARGS]{ADD}",
    "pythonic": '[weather(city="Köln [a, b]", days=3), add(a=1, b=[2])]',
    "lfm2": '<|tool_call_start|>[weather(city="Köln [a, b]", days=3), add(a=1, b=[2])]<|tool_call_end|>',
    "qwen3_coder": _CODER,
    "step3p5": _CODER,
    "nanbeige": _CODER,
    "mimo": LEAD + "\n" + _xml(_FUNCTION_TAGS, "<parameter={key}>{value}</parameter>\n"),
    "deepseekv3": LEAD
    + "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    + WEATHER
    + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    + ADD
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseekv31": LEAD
    + f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{WEATHER}<｜tool▁call▁end｜>"
    + f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseekv32": LEAD + _dsml("function_calls"),
    "deepseekv4": LEAD + _dsml("tool_calls"),
    "deepseekv41": LEAD + _dsml("calls", " "),
    "kimi_k2": LEAD
    + f"<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{WEATHER}"
    + f"<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{ADD}<|tool_call_end|>"
    + "<|tool_calls_section_end|>",
    "glm": _GLM,
    "glm45": _GLM,
    "ling3": _GLM,
    "poolside_v1": _GLM,
    "spark25": _GLM.replace("</arg_key>\n", "</arg_key>"),
    "glm47": _GLM.replace("\n", ""),
    "hunyuan": LEAD
    + "<tool_calls>\n"
    + _xml("<tool_call>{name}<tool_sep>\n{arguments}</tool_call>\n", _KEYS, "")
    + "</tool_calls>",
    "minimax-m2": f"{LEAD}\n<minimax:tool_call>\n{_INVOKE}</minimax:tool_call>",
    "dots": f"{LEAD}\n<dots_function_call>\n{_INVOKE}</dots_function_call>",
    "minicpm5": LEAD
    + "\n"
    + _xml('<function name="{name}">{arguments}</function>', '<param name="{key}">{value}</param>'),
    "step3": f"{LEAD}<｜tool_calls_begin｜>\n{_STEP}<｜tool_calls_end｜>",
    "interns1": LEAD
    + f'<|action_start|> <|plugin|>\n{{"name": "weather", "parameters": {WEATHER}}}<|action_end|>'
    + f'<|action_start|> <|plugin|>\n{{"name": "add", "parameters": {ADD}}}<|action_end|>',
    "apertus2509": f'{LEAD}<|tools_prefix|>[{{"weather": {WEATHER}}}, {{"add": {ADD}}}]<|tools_suffix|>',
    "cohere_command4": LEAD
    + f'<|START_ACTION|>[{{"tool_call_id": "0", "tool_name": "weather", "parameters": {WEATHER}}}, '
    + f'{{"tool_call_id": "1", "tool_name": "add", "parameters": {ADD}}}]<|END_ACTION|>',
    "gpt-oss": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{WEATHER}<|call|>"
    + f"<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADD}<|call|>",
}
JSON_ARRAY = f'[{{"name": "weather", "parameters": {WEATHER}}}, {{"name": "add", "parameters": {ADD}}}]'


def summed(deltas: Iterable[list[Any]]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and each call's name and arguments as text."""
    content, thought = "", ""
    calls: list[tuple[str, str]] = []
    for kind, *values in deltas:
        if kind == "c":
            content += values[0]
        elif kind == "r":
            thought += values[0]
        elif kind == "s":
            assert values[0] == len(calls), "calls are numbered in their order"
            calls.append((values[2], ""))
        else:
            name, text = calls[values[0]]
            calls[values[0]] = (name, text + values[1])
    return content, thought, calls
