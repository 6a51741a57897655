"""What one generation asks for and what an engine answers, in token ids.

Owns the value types that cross the engine port. Text lives in the frontend alone; bytes on the wire in `tandem.rpc`.
Absent (`None`) always means "the engine's or the model's default": a zero is a zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum


class FinishReason(Enum):
    """Why a generation ended. Every generation that was accepted ends with exactly one of these or one error."""

    STOP = "stop"
    """A stop token, a stop string or the model's end-of-sequence token."""
    LENGTH = "length"
    """The token budget or the context was used up."""
    ABORTED = "aborted"
    """The caller went away, or asked for the abort."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Ranges are checked at the frontend, before admission."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    """Both legs of an attempt get the same: the first token is drawn by one, the others by the other."""
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a generation ends, as far as an engine is concerned (stop strings are the frontend's work)."""

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
    """JSON: free text with parts in a grammar behind what begins them."""


GRAMMARS = tuple(kind.name for kind in fields(Guided))
"""Kinds of grammar, as the contract and SGLang name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Where and under which number two legs of one attempt meet: at the bootstrap server of the prefill worker."""

    host: str
    port: int
    room: int
    """63-bit random number, one per attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One leg of one attempt, as handed to an engine."""

    request_id: str
    """Engine-side id, unique per leg and attempt; no id is a prefix of another."""
    token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    guided: Guided | None = None
    top_logprobs: int | None = None
    """None: no log probabilities. 0: of the chosen token only. n: also of the n likeliest."""
    bootstrap: Bootstrap | None = None
    """None on an aggregated engine; required on a prefill or decode engine."""
    priority: int = 0
    cache_salt: str | None = None
    trace_headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability (natural logarithm) of one emitted token and of its likeliest rivals, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFinish:
    """The end of a generation as the engine saw it."""

    reason: FinishReason
    matched_token_id: int | None = None
    """The stop token that ended it, if one did."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was in this engine's prefix cache."""
    recomputed_tokens: int | None = None
    """Decode leg: prompt tokens this engine ran through the model itself. 0 means all KV came over the transfer."""
    timings: EngineTimings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimings:
    """When things happened inside one engine, in seconds since the Unix epoch; None: did not happen or not known."""

    queued_time_s: float | None = None
    bootstrap_end_time_s: float | None = None
    """Prefill: the legs had found each other; from here on the prompt waited for its turn."""
    preallocation_end_time_s: float | None = None
    """Decode: memory for the prompt's KV was set aside; from here on the leg waited for the KV."""
    prefill_start_time_s: float | None = None
    prefill_end_time_s: float | None = None
    kv_transfer_start_time_s: float | None = None
    kv_transfer_end_time_s: float | None = None
    first_token_time_s: float | None = None
    """The engine had the first token: computed, or come with the KV."""
    kv_transfer_bytes: int | None = None
    """Bytes of KV received (decode) or sent (prefill) by this engine for this request, as it counted them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The next tokens of a generation, in order, never repeated. The last batch carries `finish` and may be empty."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """As long as `token_ids` when asked for, else empty."""
    finish: EngineFinish | None = None
