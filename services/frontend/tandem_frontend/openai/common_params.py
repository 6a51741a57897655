"""The parameters that chat completions and completions share, and the rules of every schema here.

An unsupported parameter is rejected by name, so it is declared with the one value that has no effect. Ranges are those
of the contract and are checked with it, for OpenAI's API and Tandem's own alike.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.sampling import LOGIT_BIASES_MAX
from tandem_frontend.preparation.validation import CACHE_SALT_CHARS_MAX, PATTERN_BYTES_MAX, STOP_TOKENS_MAX, STOPS_MAX

T = TypeVar("T")

CHOICES_MAX = 128
"""Most choices of one request, over all its prompts. Lists below are bounded too: each choice gets a copy."""


def _whole(value: Any) -> Any:
    """A whole number that was written as a float, as an integer: JavaScript and spreadsheets write 100.0."""
    return int(value) if type(value) is float and value.is_integer() else value


TokenId = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
"""Without the conversion of floats, which would cost too much for each token of a long prompt."""
Int32 = Annotated[TokenId, BeforeValidator(_whole)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]


class FirstError(FailFast):
    """Stops the validation of a list at its first invalid element; hashable, as members of a union must be."""

    __hash__ = object.__hash__


Many = Annotated[list[T], FirstError()]
"""A list from a client. Only the first error is collected: a million of them would take seconds."""
MustBeNull: TypeAlias = None
"""Type of an OpenAI parameter that is not supported: rejected unless it is absent or null."""


def only(*neutral: Any) -> BeforeValidator:
    """With type None: a parameter that is not supported, but has values that ask for nothing, null and `neutral`."""
    return BeforeValidator(lambda value: None if value in neutral else value)


class Schema(BaseModel):
    """Base of all schemas: no undeclared fields, no type conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class History(BaseModel):
    """Base of what a client keeps and sends back: messages, their parts and calls.

    Undeclared fields are ignored, because clients annotate what they store and no template reads it. A field that
    asks for something is declared in the subclass, and rejected there.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class ForeignFields(Schema):
    """Parameters of other servers that clients send with the value that changes nothing; others are rejected by name.

    `only(...)` lists those values. docs/reference/openai.md has the same list.
    """

    use_beam_search: Annotated[None, only(False)] = None
    length_penalty: Annotated[None, only(1)] = None
    repeat_penalty: Annotated[None, only(1)] = None
    typical_p: Annotated[None, only(1)] = None
    mirostat: Annotated[None, only(0)] = None
    dry_multiplier: Annotated[None, only(0)] = None
    xtc_probability: Annotated[None, only(0)] = None
    include_stop_str_in_output: Annotated[None, only(False)] = None
    no_stop_trim: Annotated[None, only(False)] = None
    spaces_between_special_tokens: Annotated[None, only(True)] = None
    skip_special_tokens: Annotated[None, only(True)] = None
    return_token_ids: Annotated[None, only(False)] = None
    return_tokens_as_token_ids: Annotated[None, only(False)] = None
    return_hidden_states: Annotated[None, only(False)] = None
    prompt_logprobs: MustBeNull = None
    truncate_prompt_tokens: MustBeNull = None
    allowed_token_ids: MustBeNull = None
    bad_words: Annotated[None, only([])] = None
    logits_processors: Annotated[None, only([])] = None
    lora_path: MustBeNull = None
    guided_json: MustBeNull = None
    guided_regex: MustBeNull = None
    guided_choice: MustBeNull = None
    guided_grammar: MustBeNull = None
    structured_outputs: MustBeNull = None

    # Accepted and ignored: an annotation, a label and a hint.
    cache_control: Any = None
    request_id: str | None = None
    cache_prompt: bool | None = None


class StreamOptions(Schema):
    """What a stream contains beside its deltas."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class CommonFields(ForeignFields):
    """Parameters of both endpoints; docs/reference/openai.md describes each of them."""

    model: str = Field(min_length=1, max_length=MODEL_NAME_CHARS_MAX)

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=LOGIT_BIASES_MAX)] | None = None
    max_tokens: Int32 | None = None
    stop: str | Annotated[Many[str], Field(max_length=STOPS_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX), BeforeValidator(_whole)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Not in OpenAI's API; named as in other inference servers.
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
    stop_token_ids: Annotated[Many[Int32], Field(max_length=STOP_TOKENS_MAX)] | None = None
    ignore_eos: bool | None = None
    regex: Annotated[str, Field(max_length=PATTERN_BYTES_MAX)] | None = None
    ebnf: Annotated[str, Field(max_length=PATTERN_BYTES_MAX)] | None = None
    priority: Int32 | None = None
    cache_salt: Annotated[str, Field(max_length=CACHE_SALT_CHARS_MAX)] | None = None
    coalesce_ms: Int32 | None = None

    # Accepted and ignored: they change nothing in the output.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def choice_count(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Stop strings. An empty one stops nothing: forms send it where their field is empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return [stop for stop in given if stop]

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with an event for the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def repeats_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)
