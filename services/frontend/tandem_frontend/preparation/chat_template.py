"""The chat template of a model: renders messages as one text, in the format that the model was trained on.

The template is foreign code from a checkpoint: it runs in Jinja's sandbox, without a loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import InvalidRequest, StartError
from tandem_frontend.preparation.chat_messages import Message, flat, readable, with_text_arguments

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
RESERVED_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", *SPECIAL_NAMES}
)
"""Variables that every template gets, and that a request's template_kwargs cannot set."""


class Generation(Extension):
    """`{% generation %}`, with which templates mark what the model wrote, for its training. Renders its body."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """See Jinja's Extension."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """Renders messages."""

    def __init__(
        self,
        template: jinja2.Template,
        tool_template: jinja2.Template,
        special_tokens: dict[str, str],
        *,
        variables: frozenset[str],
    ) -> None:
        """`tool_template` is used for requests with tools; most models have a single template."""
        self._template = template
        self._tool_template = tool_template
        self._special_tokens = special_tokens
        self._variables = variables

    @classmethod
    def read(cls, model: Path) -> ChatTemplate | None:
        """The template of a model directory; None where it has none.

        Raises:
            StartError: names the file that holds a broken one.
        """
        config_file, template_file = model / "tokenizer_config.json", model / "chat_template.jinja"
        config = _read_config(config_file)
        own_file = template_file.is_file()
        entry = _checked_entry(config, config_file)
        source = _read_text(template_file) if own_file else _named(entry, "default")
        if source is None:
            return None
        tool_source = (None if own_file else _named(entry, "tool_use")) or source
        file = template_file if own_file else config_file
        special_tokens = {name: _text_of(config, name, config_file) for name in SPECIAL_NAMES if config.get(name)}
        template, _ = _compile(source, file)
        tool_template, variables = _compile(tool_source, file)
        return cls(template, tool_template, special_tokens, variables=frozenset(variables))

    @property
    def takes_tools(self) -> bool:
        """Whether the template uses `tools`."""
        return "tools" in self._variables

    def takes(self, name: str) -> bool:
        """Whether the template uses a variable that a request may set."""
        return name in self._variables and name not in RESERVED_NAMES

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """Render one text. It contains its special tokens: encode it without adding any.

        Args:
            messages: in OpenAI's format, tool calls and tool results included.
            add_generation_prompt: begin the assistant's turn at the end.
            tools: in OpenAI's format.
            template_kwargs: more variables for the template, such as enable_thinking; none of RESERVED_NAMES.

        Raises:
            InvalidRequest: the template rejects the messages.
        """
        given = readable(messages)
        attempts: list[tuple[list[dict[str, Any]], Any]] = [(given, tools or None), (with_text_arguments(given), tools)]
        if tools:
            attempts.append((given, flat(tools)))
        first: InvalidRequest | None = None
        for attempted, attempted_tools in attempts:
            try:
                return self._render(attempted, add_generation_prompt, attempted_tools or None, template_kwargs)
            except (TypeError, jinja2.UndefinedError) as problem:
                # Which format of tool calls and tools a template expects can only be found out by trying.
                first = first or InvalidRequest("chat", f"the model's chat template failed: {problem}")
            except jinja2.TemplateError as problem:
                raise InvalidRequest("chat", f"the model's chat template rejected the messages: {problem}") from None
            except (ValueError, KeyError, ArithmeticError, RecursionError) as problem:
                raise InvalidRequest("chat", f"the model's chat template failed: {problem}") from None
        assert first is not None, "every attempt has returned or failed"
        raise first

    def _render(
        self, messages: list[dict[str, Any]], begin_answer: bool, tools: Any, template_kwargs: dict[str, Any]
    ) -> str:
        template = self._tool_template if tools else self._template
        return template.render(
            {
                "documents": None,
                **self._special_tokens,
                **template_kwargs,
                "messages": messages,
                "add_generation_prompt": begin_answer,
                "tools": tools,
            }
        )


def _compile(source: str, file: Path) -> tuple[jinja2.Template, set[str]]:
    """A template, and the variables that it uses."""
    environment = _environment()
    try:
        return environment.from_string(source), jinja2.meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateError as problem:
        raise StartError(f"{file}: invalid chat template: {problem}", path=str(file)) from None


def _environment() -> ImmutableSandboxedEnvironment:
    """The same environment as in Hugging Face's transformers, which templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 -- the name templates know
    return datetime.now().astimezone().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **keywords: Any) -> str:
    """Replaces Jinja's filter, which escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **keywords)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    if not isinstance(config, dict):
        raise StartError(f"{file} is not a JSON object", path=str(file))
    return config


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise StartError(f"{file} cannot be read: {problem}", path=str(file)) from None


def _checked_entry(config: dict[str, Any], file: Path) -> Any:
    """The templates in a tokenizer_config.json: none, one, or several with names."""
    entry = config.get("chat_template")
    named = entry if isinstance(entry, list) else []
    has_names = all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in named
    )
    if (entry is not None and not isinstance(entry, str | list)) or not has_names:
        raise StartError(
            f"{file}: chat_template is neither a text nor a list of objects with name and template", path=str(file)
        )
    return entry


def _named(entry: Any, name: str) -> str | None:
    """The template of that name; a single template has the name "default"."""
    if isinstance(entry, list):
        return next((named["template"] for named in entry if named.get("name") == name), None)
    return entry if isinstance(entry, str) and name == "default" else None


def _text_of(config: dict[str, Any], name: str, file: Path) -> str:
    """The text of a special token, which some files give as an object."""
    token = config[name]
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise StartError(f"{file}: {name} is neither a text nor an object with content", path=str(file))
    return text
