"""From OpenAI's parameters to the frontend's own contract, and from the contract's field names back to theirs.

Checks only what the contract cannot know: parameters that exclude each other. All ranges are the contract's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.sampling import SCALARS
from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest, JsonSchemaFormat, TextFormat

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's own default on completions; on chat it is what the context leaves."""


def chat_request(wanted: ChatRequest) -> pb.GenerateRequest:
    """All of a chat completion but its prompt.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    most = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    if wanted.max_tokens is not None and most != wanted.max_tokens:
        raise InvalidRequest("max_completion_tokens", "differs from max_tokens: give one of them")
    request = _common(wanted, most)
    if wanted.logprobs:
        request.logprobs.top_logprobs = wanted.top_logprobs or 0
    return request


def completion_request(wanted: CompletionRequest) -> pb.GenerateRequest:
    """All of a completion but its prompt.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    if wanted.best_of is not None and wanted.best_of != wanted.choice_count:
        raise InvalidRequest("best_of", "is supported only where it equals n")
    if wanted.echo and wanted.logprobs is not None:
        raise InvalidRequest("echo", "with logprobs is not supported: the prompt's log probabilities are not computed")
    request = _common(wanted, COMPLETION_TOKENS_DEFAULT if wanted.max_tokens is None else wanted.max_tokens)
    if wanted.logprobs is not None:
        request.logprobs.top_logprobs = wanted.logprobs
    return request


def for_choice(request: pb.GenerateRequest, token_ids: Sequence[int], number: int) -> pb.GenerateRequest:
    """The request of one choice. With a seed, each choice of a prompt draws its own tokens, repeatably."""
    own = pb.GenerateRequest()
    own.CopyFrom(request)
    own.token_ids.ids.extend(token_ids)
    if own.sampling.HasField("seed"):
        # Wraps around, as the seed is one of 64 bits.
        own.sampling.seed = (own.sampling.seed + number + 2**63) % 2**64 - 2**63
    return own


def parameter(field: str, wanted: ChatRequest | CompletionRequest) -> str:
    """The parameter behind a field of the contract."""
    if field.split(".")[0] in {"token_ids", "chat", "prompt"}:
        return "messages" if isinstance(wanted, ChatRequest) else "prompt"
    if field.startswith("guided.json_schema"):
        return "response_format" if wanted.response_format is not None else "tools"
    if field == "stopping.max_tokens" and getattr(wanted, "max_completion_tokens", None) is not None:
        return "max_completion_tokens"
    if field in {"logprobs.top_logprobs", "top_logprobs"}:
        return "top_logprobs" if isinstance(wanted, ChatRequest) else "logprobs"
    for part in ("sampling.", "stopping.", "guided."):
        field = field.removeprefix(part)
    return field


def _common(wanted: CommonFields, max_tokens: int | None) -> pb.GenerateRequest:
    if wanted.stream_options is not None and not wanted.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    request = pb.GenerateRequest(model=wanted.model)
    for name in SCALARS:
        value = getattr(wanted, name)
        if value is not None:
            setattr(request.sampling, name, value)
    for token, bias in (wanted.logit_bias or {}).items():
        request.sampling.logit_bias[_token_id(token)] = bias
    if max_tokens is not None:
        request.stopping.max_tokens = max_tokens
    if wanted.min_tokens is not None:
        request.stopping.min_tokens = wanted.min_tokens
    request.stopping.stop.extend(wanted.stops)
    request.stopping.stop_token_ids.extend(wanted.stop_token_ids or ())
    request.stopping.ignore_eos = bool(wanted.ignore_eos)
    for name in ("priority", "cache_salt", "coalesce_ms"):
        if getattr(wanted, name) is not None:
            setattr(request, name, getattr(wanted, name))
    _set_grammar(request, wanted)
    return request


def _set_grammar(request: pb.GenerateRequest, wanted: Any) -> None:
    """The one grammar of the answer."""
    given: dict[str, dict[str, str]] = {}
    if wanted.response_format is not None and not isinstance(wanted.response_format, TextFormat):
        given["response_format"] = {"json_schema": json.dumps(_schema_of(wanted.response_format))}
    if wanted.regex is not None:
        given["regex"] = {"regex": wanted.regex}
    if wanted.ebnf is not None:
        given["ebnf"] = {"ebnf": wanted.ebnf}
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequest(second, f"cannot be combined with {first}: an answer follows one grammar")
    for name, grammar in given.items():
        if "" in grammar.values():
            raise InvalidRequest(name, "must not be empty")
        for kind, text in grammar.items():
            setattr(request.guided, kind, text)


def _schema_of(form: Any) -> dict[str, Any]:
    if isinstance(form, JsonSchemaFormat) and form.json_schema.schema_ is not None:
        return form.json_schema.schema_
    return {"type": "object"}


def _token_id(token: str) -> int:
    """OpenAI sends token ids as the names of a JSON object."""
    # Ten digits hold every id of 31 bits; int() of a very long text is slow.
    if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) >= 2**31:
        raise InvalidRequest("logit_bias", f"{token[:20]!r} is no token id")
    return int(token)
