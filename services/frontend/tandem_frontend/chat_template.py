"""The chat template of a model: messages to one text, as the model was trained to read them.

Runs Jinja from a checkpoint, which is code from somebody else: in the sandbox, without a loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import InvalidRequest, StartError

Message = dict[str, str]
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """Renders messages."""

    def __init__(self, template: jinja2.Template, special_tokens: dict[str, str]) -> None:
        self._template = template
        self._special_tokens = special_tokens

    @classmethod
    def read(cls, model: Path) -> ChatTemplate | None:
        """The template of a model directory; None where it has none.

        Raises:
            StartError: names the file that holds a broken one.
        """
        config_file, template_file = model / "tokenizer_config.json", model / "chat_template.jinja"
        config = _read_config(config_file)
        own_file = template_file.is_file()
        source = template_file.read_text() if own_file else _default_of(config.get("chat_template"))
        if source is None:
            return None
        try:
            template = _environment().from_string(source)
        except jinja2.TemplateError as problem:
            file = template_file if own_file else config_file
            raise StartError(f"{file}: the chat template is broken: {problem}", path=str(file)) from None
        return cls(template, {name: _text_of(config[name]) for name in SPECIAL_NAMES if config.get(name)})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """One text; it is to be encoded without adding special tokens, for they are in it.

        Raises:
            InvalidRequest: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except jinja2.TemplateError as problem:
            raise InvalidRequest("chat", f"the model's chat template refuses it: {problem}") from None
        except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as problem:
            raise InvalidRequest("chat", f"the model's chat template fails on it: {problem}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """As Hugging Face's own: templates are written against it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 -- the name templates know
    return datetime.now().astimezone().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **keywords: Any) -> str:
    """Jinja's own would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **keywords)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError) as problem:
        raise StartError(f"{file} cannot be read as JSON: {problem}", path=str(file)) from None
    if not isinstance(config, dict):
        raise StartError(f"{file} is not a JSON object", path=str(file))
    return config


def _default_of(entry: Any) -> str | None:
    """One template, or a list of named ones of which "default" is meant."""
    if isinstance(entry, list):
        return next((named["template"] for named in entry if named.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None


def _text_of(token: Any) -> str:
    """Older files describe a token by an object."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
