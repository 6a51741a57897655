"""Validation of requests. An error names the field as the contract calls it, and its limit.

The ranges are those stated in the contracts' comments; a test compares the two. What only an engine can check (whether
a grammar compiles) is left to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import sampling_pb2
from tandem.domain.json_bounds import check_json_bounds
from tandem.domain.limits import PROMPT_LOGPROBS_MAX, REQUEST_ID_CHARS_MAX, TOP_LOGPROBS_MAX
from tandem.errors import ContextExceeded, InvalidRequest
from tandem.rpc.convert import present
from tandem_frontend.preparation.sampling import check_ranges
from tandem_frontend.preparation.tokenizer import BLOCKING_CHARS_MAX, Tokenizer

REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{REQUEST_ID_CHARS_MAX}}}")
ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
STOPS_MAX = 16
STOP_BYTES_MAX = 1_024
STOP_TOKENS_MAX = 64
CACHE_SALT_CHARS_MAX = 128
SESSION_ID_CHARS_MAX = 128
PRIORITY_MAX = 100
COALESCE_MS_MAX = 1_000
GRAMMAR_BYTES_MAX = 64 * 1_024
PATTERN_BYTES_MAX = 16 * 1_024
TOOL_GRAMMAR_BYTES_MAX = 1_024 * 1_024
"""For a grammar that the frontend made of a request's tools: 42 kB of a single one with glm47."""
"""Limit of a grammar that is not JSON. Lower, because its nesting is not checked before an engine compiles it."""
CHECKED_TOKENS = 8_192
"""Token ids of a prompt checked between two yields to the event loop: a third of a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A valid, tokenised request."""

    request_id: str
    prompt_field: str
    """The field that contained the prompt."""
    token_ids: Sequence[int]
    """A protobuf list, which a message copies as a whole."""
    sampling: sampling_pb2.Sampling
    max_tokens: int
    min_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    guided: sampling_pb2.Guided | None
    logprobs: sampling_pb2.LogprobsOptions | None
    priority: int | None
    cache_salt: str | None
    session_id: str | None
    skip_special_tokens: bool
    coalesce_s: float | None
    """The request's own limit for holding a chunk; None: the frontend's."""


def new_request_id() -> str:
    """An id for a request whose client has not chosen one."""
    return uuid.uuid4().hex


async def checked_generate(
    request: pb.GenerateRequest, tokenizer: Tokenizer, default_id: str = "", *, has_tool_grammar: bool = False
) -> CheckedRequest:
    """Check a request, tokenise its prompt, and fill in its limits. Without an id it gets `default_id`, or a new one.

    `has_tool_grammar`: the frontend made the grammar, so that limits for those of clients do not apply.

    Raises:
        InvalidRequest: names the first invalid field.
    """
    request_id = request.request_id if request.HasField("request_id") else default_id or new_request_id()
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest(
            "request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters of a-z, A-Z, 0-9, '.', '_', '-'"
        )
    check_ranges(request.sampling)
    check_token_ids("sampling.logit_bias", request.sampling.logit_bias, tokenizer.vocabulary_size)
    _check_stopping(request.stopping, tokenizer.vocabulary_size)
    _check_rest(request)
    if has_tool_grammar:
        _check_tool_grammar(request.guided)
    else:
        _check_guided(request.guided)
    token_ids = await _prompt_ids(request, tokenizer)
    _check_prompt_logprobs(request, len(token_ids))
    left_tokens = tokenizer.context_tokens_max - len(token_ids)
    stopping = request.stopping
    # A max_tokens beyond the context is no error: the generation then ends with LENGTH where the context does.
    max_tokens = min(stopping.max_tokens, left_tokens) if stopping.HasField("max_tokens") else left_tokens
    min_tokens = present(stopping, "min_tokens", min(stopping.min_tokens, max_tokens))
    return CheckedRequest(
        request_id=request_id,
        prompt_field=str(request.WhichOneof("input")),
        token_ids=token_ids,
        sampling=request.sampling,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        guided=present(request, "guided", request.guided),
        logprobs=present(request, "logprobs", request.logprobs),
        priority=present(request, "priority", request.priority),
        cache_salt=present(request, "cache_salt", request.cache_salt),
        session_id=present(request, "session_id", request.session_id),
        skip_special_tokens=request.skip_special_tokens if request.HasField("skip_special_tokens") else True,
        coalesce_s=request.coalesce_ms / 1_000 if request.HasField("coalesce_ms") else None,
    )


@contextlib.contextmanager
def naming_the_prompt(field: str) -> Iterator[None]:
    """Rename errors about `token_ids`, which workers get, to the field of the prompt, which the client knows."""
    try:
        yield
    except InvalidRequest as problem:
        if problem.field != "token_ids":
            raise
        raise problem.renamed(field) from None


async def checked_tokenize(request: pb.TokenizeRequest, tokenizer: Tokenizer) -> Sequence[int]:
    """Token ids of a text or of messages; they may be more than the context holds.

    Raises:
        InvalidRequest: neither is given, or the text is far longer than the context.
    """
    kind = request.WhichOneof("input")
    if kind == "prompt":
        text = request.prompt
        check_text("prompt", text, tokenizer)
        return await tokenizer.encode(text, add_special_tokens=True)
    if kind == "chat":
        return await _chat_ids(request.chat, tokenizer)
    raise InvalidRequest("input", "one of prompt and chat must be given")


def checked_detokenize(request: pb.DetokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a request.

    Raises:
        InvalidRequest: more than the context holds, or one is outside the vocabulary.
    """
    count, most = len(request.token_ids), tokenizer.context_tokens_max
    if count > most:
        raise InvalidRequest("token_ids", f"{count} exceed the model's context of {most} tokens", limit=most)
    token_ids = list(request.token_ids)
    check_token_ids("token_ids", token_ids, tokenizer.vocabulary_size)
    return token_ids


async def _prompt_ids(request: pb.GenerateRequest, tokenizer: Tokenizer) -> Sequence[int]:
    kind = request.WhichOneof("input")
    token_ids: Sequence[int]
    if kind == "prompt":
        # Read once: protobuf decodes it anew for each access.
        text = request.prompt
        if not text:
            raise InvalidRequest("prompt", "must not be empty")
        check_text("prompt", text, tokenizer)
        token_ids = await tokenizer.encode(text, add_special_tokens=True)
    elif kind == "chat":
        token_ids = await _chat_ids(request.chat, tokenizer)
    elif kind == "token_ids":
        check_token_count(kind, len(request.token_ids.ids), tokenizer)
        # The message's own list, which never changes: a leg copies it as a whole.
        token_ids = request.token_ids.ids
    else:
        raise InvalidRequest("input", "one of prompt, token_ids and chat must be given")
    if not token_ids:
        raise InvalidRequest(kind, "must not be empty")
    if kind == "token_ids" or not tokenizer.fits_vocabulary:
        # Text too: the tokenizer may have tokens beyond the model's embedding, and one of those crashes an engine.
        await check_prompt_ids(kind, token_ids, tokenizer.vocabulary_size)
    check_token_count(kind, len(token_ids), tokenizer)
    return token_ids


async def _chat_ids(chat: pb.Chat, tokenizer: Tokenizer) -> Sequence[int]:
    if tokenizer.chat_template is None:
        raise InvalidRequest("chat", "this model has no chat template; use prompt")
    if not chat.messages:
        raise InvalidRequest("chat.messages", "must not be empty")
    # A template renders each message as one token at least.
    check_token_count("chat.messages", len(chat.messages), tokenizer, what="messages")
    if chat.ByteSize() <= BLOCKING_CHARS_MAX:
        text = _rendered(chat, tokenizer)
    else:
        text = await asyncio.to_thread(_rendered, chat, tokenizer)
    return await tokenizer.encode(text, add_special_tokens=False, field="chat")


def _rendered(chat: pb.Chat, tokenizer: Tokenizer) -> str:
    assert tokenizer.chat_template is not None, "checked before"
    messages: list[dict[str, str]] = []
    left_bytes = tokenizer.prompt_bytes_max
    for number, message in enumerate(chat.messages):
        check_role(f"chat.messages[{number}].role", message.role)
        field, content = f"chat.messages[{number}].content", message.content
        check_text(field, content, tokenizer)
        left_bytes -= len(content.encode())
        if left_bytes < 0:
            raise _too_long("chat.messages", f"the contents up to message {number}", tokenizer.context_tokens_max)
        messages.append({"role": message.role, "content": tokenizer.without_control(content)})
    begin_answer = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    text = tokenizer.chat_template.render(messages, add_generation_prompt=begin_answer)
    check_text("chat", text, tokenizer)
    return text


def check_role(field: str, role: str) -> None:
    """Check a role's characters: templates print it unescaped, so it could end a turn and begin another role's.

    Raises:
        InvalidRequest: names the field.
    """
    if not ROLE.fullmatch(role):
        raise InvalidRequest(field, "must be 1 to 64 characters of a-z, A-Z, 0-9, '_', '-'")


def check_text(field: str, text: str, tokenizer: Tokenizer) -> None:
    """Reject a text that cannot fit the context, before any work on it.

    Raises:
        ContextExceeded: names the field.
    """
    # A character has one to four bytes: only texts near the limit must be encoded to be measured.
    most = tokenizer.prompt_bytes_max
    if len(text) > most or (4 * len(text) > most and len(text.encode()) > most):
        raise _too_long(field, f"{len(text)} characters", tokenizer.context_tokens_max)


def _too_long(field: str, size: str, context_tokens_max: int) -> ContextExceeded:
    # Client libraries recognise an overlong prompt by "maximum context length is".
    sentence = f"this model's maximum context length is {context_tokens_max} tokens; {size} leave none for a completion"
    return ContextExceeded(field, sentence, limit=context_tokens_max)


def check_token_count(field: str, count: int, tokenizer: Tokenizer, *, what: str = "tokens") -> None:
    """Reject a list that cannot fit the context, before any work on it.

    Raises:
        ContextExceeded: names the field.
    """
    if count >= tokenizer.context_tokens_max:
        raise _too_long(field, f"{count} {what}", tokenizer.context_tokens_max)


def check_token_ids(field: str, token_ids: Collection[int], vocabulary_size: int) -> None:
    """Reject token ids outside the vocabulary.

    Raises:
        InvalidRequest: names the field.
    """
    # min and max run in C; the loop runs only to find the id for the message.
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocabulary_size)
        raise InvalidRequest(field, f"{wrong} is outside the vocabulary of {vocabulary_size} tokens")


async def check_prompt_ids(field: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    """`check_token_ids` for a list of any length; yields to the event loop between parts.

    Raises:
        InvalidRequest: names the field.
    """
    for begin in range(0, len(token_ids), CHECKED_TOKENS):
        if begin:
            await asyncio.sleep(0)
        check_token_ids(field, token_ids[begin : begin + CHECKED_TOKENS], vocabulary_size)


def _check_stopping(stopping: sampling_pb2.Stopping, vocabulary_size: int) -> None:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", f"must be at least 1, not {stopping.max_tokens}")
    if stopping.min_tokens < 0:
        raise InvalidRequest("stopping.min_tokens", f"must be at least 0, not {stopping.min_tokens}")
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        raise InvalidRequest(
            "stopping.min_tokens",
            f"must be at most max_tokens ({stopping.max_tokens}), not {stopping.min_tokens}",
        )
    if len(stopping.stop) > STOPS_MAX:
        raise InvalidRequest("stopping.stop", f"must be at most {STOPS_MAX} strings, not {len(stopping.stop)}")
    for stop in stopping.stop:
        if not 0 < len(stop.encode()) <= STOP_BYTES_MAX:
            raise InvalidRequest("stopping.stop", f"each must be 1 to {STOP_BYTES_MAX} bytes long")
    if len(stopping.stop_token_ids) > STOP_TOKENS_MAX:
        raise InvalidRequest(
            "stopping.stop_token_ids", f"must be at most {STOP_TOKENS_MAX} ids, not {len(stopping.stop_token_ids)}"
        )
    check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, vocabulary_size)


def _check_rest(request: pb.GenerateRequest) -> None:
    if abs(request.priority) > PRIORITY_MAX:
        raise InvalidRequest("priority", f"must be -{PRIORITY_MAX} to {PRIORITY_MAX}, not {request.priority}")
    if len(request.cache_salt) > CACHE_SALT_CHARS_MAX:
        raise InvalidRequest("cache_salt", f"must be at most {CACHE_SALT_CHARS_MAX} characters long")
    if len(request.session_id) > SESSION_ID_CHARS_MAX:
        raise InvalidRequest("session_id", f"must be at most {SESSION_ID_CHARS_MAX} characters long")
    if not 0 <= request.logprobs.top_logprobs <= TOP_LOGPROBS_MAX:
        raise InvalidRequest(
            "logprobs.top_logprobs", f"must be 0 to {TOP_LOGPROBS_MAX}, not {request.logprobs.top_logprobs}"
        )
    if not 0 <= request.coalesce_ms <= COALESCE_MS_MAX:
        raise InvalidRequest("coalesce_ms", f"must be 0 to {COALESCE_MS_MAX}, not {request.coalesce_ms}")


def _check_prompt_logprobs(request: pb.GenerateRequest, prompt_tokens: int) -> None:
    if not request.logprobs.prompt:
        return
    # They come with the engine's finish, which does not follow when the frontend ends a generation.
    if request.stopping.stop:
        raise InvalidRequest("stopping.stop", "cannot be combined with log probabilities of the prompt")
    if request.stopping.ignore_eos and request.stopping.stop_token_ids:
        problem = "with ignore_eos cannot be combined with log probabilities of the prompt"
        raise InvalidRequest("stopping.stop_token_ids", problem)
    count = prompt_tokens * (1 + request.logprobs.top_logprobs)
    if count > PROMPT_LOGPROBS_MAX:
        problem = f"must be at most {PROMPT_LOGPROBS_MAX} log probabilities, not {count}, for {prompt_tokens} tokens"
        raise InvalidRequest("logprobs.prompt", problem, limit=PROMPT_LOGPROBS_MAX)


def _check_tool_grammar(guided: sampling_pb2.Guided) -> None:
    kind = guided.WhichOneof("grammar")
    if kind is not None and len(getattr(guided, kind).encode()) > TOOL_GRAMMAR_BYTES_MAX:
        raise InvalidRequest("tools", f"their grammar must be at most {TOOL_GRAMMAR_BYTES_MAX} bytes long")


def _check_guided(guided: sampling_pb2.Guided) -> None:
    kind = guided.WhichOneof("grammar")
    if kind is None:
        return
    grammar = getattr(guided, kind)
    bytes_max = PATTERN_BYTES_MAX if kind in ("regex", "ebnf") else GRAMMAR_BYTES_MAX
    if not 0 < len(grammar.encode()) <= bytes_max:
        raise InvalidRequest(f"guided.{kind}", f"must be 1 to {bytes_max} bytes long")
    if kind in ("json_schema", "structural_tag"):
        try:
            schema: Any = json.loads(grammar)
        except (ValueError, RecursionError) as problem:
            raise InvalidRequest(f"guided.{kind}", f"is not JSON: {problem}") from None
        allowed = dict | bool if kind == "json_schema" else dict
        if not isinstance(schema, allowed):
            raise InvalidRequest(f"guided.{kind}", "is not a JSON object")
        check_json_bounds(f"guided.{kind}", schema)
