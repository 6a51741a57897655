"""Translates OpenAI's parameters to the frontend's own contract, and the contract's field names back.

Checks only what the contract cannot know: parameters that exclude each other. Ranges are checked with the contract.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.sampling import SCALARS, TOP_K_ALL
from tandem.errors import InvalidRequest
from tandem_frontend.openai.common_params import CommonFields
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest, JsonSchemaFormat, TextFormat

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's default for completions; for chat it is the rest of the context."""


def chat_request(body: ChatRequest) -> pb.GenerateRequest:
    """The request of a chat completion, without its prompt.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "requires logprobs to be true")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens is not None and most != body.max_tokens:
        raise InvalidRequest("max_completion_tokens", "differs from max_tokens: set only one of them")
    request = _common(body, most)
    if body.logprobs:
        request.logprobs.top_logprobs = body.top_logprobs or 0
    return request


def completion_request(body: CompletionRequest) -> pb.GenerateRequest:
    """The request of a completion, without its prompt.

    Raises:
        InvalidRequest: parameters contradict each other.
    """
    if body.best_of is not None and body.best_of != body.choice_count:
        raise InvalidRequest("best_of", "is supported only where it equals n")
    if body.echoes_logprobs and body.stream:
        raise InvalidRequest("stream", "with echo and logprobs is not supported: those of the prompt come at the end")
    most = COMPLETION_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    # An engine has to compute the prompt, and returns a token with it.
    request = _common(body, 1 if body.is_echo_only else most)
    if body.logprobs is not None:
        request.logprobs.top_logprobs = body.logprobs
    if body.echoes_logprobs:
        request.logprobs.prompt = True
    return request


def for_choice(request: pb.GenerateRequest, token_ids: Sequence[int], number: int) -> pb.GenerateRequest:
    """The request of one choice. A seed is increased by the choice's number, so that choices differ repeatably."""
    own = pb.GenerateRequest()
    own.CopyFrom(request)
    own.token_ids.ids.extend(token_ids)
    if own.sampling.HasField("seed"):
        # Wraps around in the signed 64 bits of the field.
        own.sampling.seed = (own.sampling.seed + number + 2**63) % 2**64 - 2**63
    return own


def parameter(field: str, body: ChatRequest | CompletionRequest) -> str:
    """The OpenAI parameter of a field of the contract."""
    # Both endpoints send token ids to the pipeline, so an error about the prompt names a field the client never sent.
    if field.split(".")[0] in {"token_ids", "chat", "prompt"}:
        return "messages" if isinstance(body, ChatRequest) else "prompt"
    if field.startswith("guided."):
        # A grammar that the client did not send was made of its tools.
        if field.startswith("guided.json_schema") and body.response_format is not None:
            return "response_format"
        return field.split(".")[1] if body.regex is not None or body.ebnf is not None else "tools"
    if field == "stopping.max_tokens" and getattr(body, "max_completion_tokens", None) is not None:
        return "max_completion_tokens"
    if field in {"logprobs.top_logprobs", "logprobs.prompt", "top_logprobs"}:
        return "top_logprobs" if isinstance(body, ChatRequest) else "logprobs"
    for part in ("sampling.", "stopping.", "guided."):
        field = field.removeprefix(part)
    return field


def _common(body: CommonFields, max_tokens: int | None) -> pb.GenerateRequest:
    if (body.includes_usage or body.repeats_usage) and not body.stream:
        raise InvalidRequest("stream_options", "requires stream to be true")
    request = pb.GenerateRequest(model=body.model)
    for name in SCALARS:
        value = getattr(body, name)
        if value is not None:
            setattr(request.sampling, name, value)
    _take_neutral(request)
    for token, bias in (body.logit_bias or {}).items():
        request.sampling.logit_bias[_token_id(token)] = bias
    if max_tokens is not None:
        request.stopping.max_tokens = max_tokens
    if body.min_tokens is not None:
        request.stopping.min_tokens = body.min_tokens
    request.stopping.stop.extend(body.stops)
    request.stopping.stop_token_ids.extend(body.stop_token_ids or ())
    request.stopping.ignore_eos = bool(body.ignore_eos)
    for name in ("priority", "cache_salt", "coalesce_ms"):
        if getattr(body, name) is not None:
            setattr(request, name, getattr(body, name))
    _set_grammar(request, body)
    return request


def _take_neutral(request: pb.GenerateRequest) -> None:
    """Values that other servers take and the contract does not: all tokens as 0, and a nucleus of one token."""
    sampling = request.sampling
    if sampling.HasField("top_k") and sampling.top_k == 0:
        sampling.top_k = TOP_K_ALL
    if sampling.HasField("top_p") and sampling.top_p == 0:
        sampling.ClearField("top_p")
        sampling.top_k = 1


def _set_grammar(request: pb.GenerateRequest, body: Any) -> None:
    """Set the grammar that the output must follow, if any."""
    given: dict[str, dict[str, str]] = {}
    if body.response_format is not None and not isinstance(body.response_format, TextFormat):
        given["response_format"] = {"json_schema": json.dumps(_schema_of(body.response_format))}
    if body.regex is not None:
        given["regex"] = {"regex": body.regex}
    if body.ebnf is not None:
        given["ebnf"] = {"ebnf": body.ebnf}
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequest(second, f"cannot be combined with {first}: only one grammar is allowed")
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
    """A token id from a key of the `logit_bias` object, where OpenAI has them as text."""
    # Ten digits hold every 31-bit id; int() of a very long text is slow.
    if not token.isascii() or not token.isdigit() or len(token) > 10 or int(token) >= 2**31:
        raise InvalidRequest("logit_bias", f"{token[:20]!r} is not a token id")
    return int(token)
