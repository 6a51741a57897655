"""A generation's parameters and an engine's results, in token ids.

Owns the value types that cross the engine port. Only the frontend handles text; `tandem.rpc` converts to protobuf.
`None` always means "the engine's or the model's default"; zero is a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from tandem.domain.adapter import Adapter


class FinishReason(Enum):
    """Why a generation ended. Every accepted generation ends with exactly one of these or one error."""

    STOP = "stop"
    """A stop token, a stop string or the model's end-of-sequence token."""
    LENGTH = "length"
    """The token budget or the context was used up."""
    ABORTED = "aborted"
    """The caller disconnected or requested the abort."""


class KvCheck(Enum):
    """Whether the KV of a hand-over was compared with what prefill sent, before anything was generated from it."""

    MATCHED = "matched"
    """Both engines computed a digest of it, and the two are equal."""
    UNCHECKED = "unchecked"
    """No comparison: switched off, not in the sample, or the prefill engine computed no digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is sampled. The frontend checks the ranges before admission."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    """The same for both legs of an attempt: prefill samples the first token, decode the others."""
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When an engine ends a generation. Stop strings are not here: the frontend matches them."""

    max_tokens: int
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """A grammar the output must follow; exactly one field is set."""

    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    """JSON text: free text in which a trigger starts a part that must follow a grammar."""


GRAMMARS = tuple(kind.name for kind in fields(Guided))
"""Kinds of grammar, as the contract and SGLang name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Where the two legs of an attempt connect: the prefill worker's bootstrap server, and the bootstrap room."""

    host: str
    port: int
    room: int
    """63-bit random number, one per attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptions:
    """How an embedding is computed."""

    dimensions: int | None = None
    """Numbers in it; None: all that the model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One leg of one attempt, as submitted to an engine."""

    request_id: str
    """Engine-side id, unique per leg and attempt; no id is a prefix of another."""
    token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    guided: Guided | None = None
    top_logprobs: int | None = None
    """None: no log probabilities. 0: of the sampled token only. n: also of the n most likely tokens."""
    prompt_logprobs: bool = False
    """With `top_logprobs`: those of the prompt's tokens too. Never on a decode engine, which does not compute them."""
    bootstrap: Bootstrap | None = None
    """None on an aggregated engine; required on a prefill or decode engine."""
    priority: int = 0
    cache_salt: str | None = None
    adapter: Adapter | None = None
    """None: the model alone."""
    trace_headers: dict[str, str] = field(default_factory=dict)
    embedding: EmbeddingOptions | None = None
    """Set: the prompt's embedding is computed, and nothing is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability (natural logarithm) of an emitted token and of the most likely tokens, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFinish:
    """The end of a generation as reported by the engine."""

    reason: FinishReason
    matched_token_id: int | None = None
    """The stop token that ended it, if one did."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was in this engine's prefix cache."""
    recomputed_tokens: int | None = None
    """Decode leg: prompt tokens that this engine computed itself. 0: all KV was received."""
    kv_check: KvCheck | None = None
    """Decode leg: whether its KV was compared. None: not known, or nothing was handed over."""
    timings: EngineTimings | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens after the first, if requested."""
    embedding: tuple[float, ...] = ()
    """The prompt's embedding, if requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimings:
    """Timestamps inside one engine, in seconds since the Unix epoch; None: did not happen or unknown."""

    queued_time_s: float | None = None
    bootstrap_end_time_s: float | None = None
    """Prefill: the legs had connected; from here on the prompt was queued."""
    preallocation_end_time_s: float | None = None
    """Decode: memory for the prompt's KV was allocated; from here on the leg waited for the KV."""
    prefill_start_time_s: float | None = None
    prefill_end_time_s: float | None = None
    kv_transfer_start_time_s: float | None = None
    kv_transfer_end_time_s: float | None = None
    first_token_time_s: float | None = None
    """The engine had the first token, computed or received with the KV."""
    kv_transfer_bytes: int | None = None
    """KV bytes received (decode) or sent (prefill) by this engine for this request, as measured by the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The next tokens of a generation, in order, never repeated. The last batch carries `finish` and may be empty."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token if requested, else empty."""
    finish: EngineFinish | None = None
