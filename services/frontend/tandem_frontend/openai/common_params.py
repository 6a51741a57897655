"""The parameters that chat completions and completions have in common, and the rules every schema here follows.

A parameter that cannot be honoured is refused by name, so it is declared with the one value that means nothing. Ranges
are those of the contracts and are checked behind this door, in one place for all doors.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.sampling import LOGIT_BIASES_MAX
from tandem_frontend.preparation.validation import CACHE_SALT_CHARS_MAX, PATTERN_BYTES_MAX, STOP_TOKENS_MAX, STOPS_MAX

T = TypeVar("T")

CHOICES_MAX = 128
"""Of one request, over all its prompts. What each one is given is bounded here too, before it is copied for each."""

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class FirstFault(FailFast):
    """Validation of a list ends at its first wrong element; hashable, as parts of a union must be."""

    __hash__ = object.__hash__


Many = Annotated[list[T], FirstFault()]
"""A list of a client's: the first wrong element is enough, a million of them would be collected for seconds."""
MustBeNull: TypeAlias = None
"""Type of an OpenAI parameter that is not supported: rejected unless it is absent or null."""


class Schema(BaseModel):
    """Exactly what is declared, in exactly the types declared."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Schema):
    """What a stream carries beside its deltas."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CommonFields(Schema):
    """Parameters of both completion calls. docs/openai.md says what each one does here."""

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

    # Beyond OpenAI's API, by the names other servers of open models use.
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

    # Accepted because to ignore them harms nobody.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def choice_count(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)
