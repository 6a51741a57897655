"""The parameters that chat completions and completions share, and the rules of every schema here.

An unsupported parameter is rejected by name, so it is declared with the one value that has no effect. Ranges are those
of the contract and are checked with it, for OpenAI's API and Tandem's own alike.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.sampling import LOGIT_BIASES_MAX
from tandem_frontend.preparation.validation import CACHE_SALT_CHARS_MAX, PATTERN_BYTES_MAX, STOP_TOKENS_MAX, STOPS_MAX

T = TypeVar("T")

CHOICES_MAX = 128
"""Most choices of one request, over all its prompts. Lists below are bounded too: each choice gets a copy."""

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class FirstError(FailFast):
    """Stops the validation of a list at its first invalid element; hashable, as members of a union must be."""

    __hash__ = object.__hash__


Many = Annotated[list[T], FirstError()]
"""A list from a client. Only the first error is collected: a million of them would take seconds."""
MustBeNull: TypeAlias = None
"""Type of an OpenAI parameter that is not supported: rejected unless it is absent or null."""


class Schema(BaseModel):
    """Base of all schemas: no undeclared fields, no type conversion."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Schema):
    """What a stream contains beside its deltas."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonFields(Schema):
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
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
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
    metadata: dict[str, str] | None = None
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
        """Stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with an event for the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
