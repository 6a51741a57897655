"""From SGLang's stream of cumulative outputs to token batches, each token once, and to the one ending or error.

Pure: knows SGLang's names, imports none of it.
"""

from __future__ import annotations

import re
from typing import Any

from tandem.engine.sglang import grammars
from tandem.engine.sglang.hooks import FACTS_KEY
from tandem.errors import (
    ContextExceeded,
    EngineFailed,
    InvalidRequest,
    LegFailed,
    NotSupported,
    RequestError,
    TandemError,
)
from tandem.model.generation import (
    EngineFinish,
    EngineRequest,
    EngineTimings,
    FinishReason,
    TokenBatch,
    TokenLogprob,
)

BAD_REQUEST = 400
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_TIMINGS = (
    "queued_time_s",
    "bootstrap_end_time_s",
    "preallocation_end_time_s",
    "prefill_start_time_s",
    "prefill_end_time_s",
    "kv_transfer_start_time_s",
    "kv_transfer_end_time_s",
    "first_token_time_s",
    "kv_transfer_bytes",
)
_FIELDS = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "repetition_penalty": "sampling.repetition_penalty",
    "logit_bias": "sampling.logit_bias",
    "min_new_tokens": "stopping.min_tokens",
    "max_new_tokens": "stopping.max_tokens",
    "logprob": "logprobs.top_logprobs",
    "priority": "priority",
    "bootstrap": "bootstrap",
}
"""Words in SGLang's refusals, and the field each one is about."""
_ROOT_CAUSE = re.compile(r"KVTransferError\([^)]*\): (.*)$", re.DOTALL)
_TOO_LONG = ("maximum allowed length", "model's context length")
_COMPILER_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""What XGrammar puts before its sentence: a time, and a line of its own source."""
_BOOTSTRAP_WORDS = ("bootstrap", "Could not fetch", "parallel info")


class Answers:
    """Reads the answers to one request."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._sent_count = 0

    def read(self, chunk: dict[str, Any]) -> TokenBatch | None:
        """Whatever is new in it; None when nothing is.

        Raises:
            InvalidRequest, LegFailed, EngineFailed: the engine ended the request, and why.
        """
        meta = chunk["meta_info"]
        reason = meta["finish_reason"]
        if reason is not None and reason["type"] == "abort":
            raise self._error(reason)
        # SGLang hands out one growing list: a later chunk may already be in it.
        token_ids = tuple(chunk["output_ids"][self._sent_count :])
        logprobs = self._logprobs(meta, len(token_ids))
        self._sent_count += len(token_ids)
        if not token_ids and reason is None:
            return None
        return TokenBatch(
            token_ids=token_ids, logprobs=logprobs, finish=None if reason is None else self._finish(meta, reason)
        )

    def aborted(self) -> TokenBatch:
        """The ending of a request that this side has given up."""
        return TokenBatch(
            finish=EngineFinish(
                reason=FinishReason.ABORTED,
                prompt_tokens=len(self._request.token_ids),
                completion_tokens=self._sent_count,
            )
        )

    def _logprobs(self, meta: dict[str, Any], count: int) -> tuple[TokenLogprob, ...]:
        if self._request.top_logprobs is None:
            return ()
        here = slice(self._sent_count, self._sent_count + count)
        chosen = meta["output_token_logprobs"][here]
        rivals = meta["output_top_logprobs"][here] if self._request.top_logprobs else [None] * len(chosen)
        if not len(chosen) == len(rivals) == count:
            raise EngineFailed(f"the engine sent {len(chosen)} log probabilities with {count} tokens")
        return tuple(
            TokenLogprob(token_id=token_id, logprob=logprob, top=tuple((t, p) for p, t, _ in top or ()))
            for (logprob, token_id, _), top in zip(chosen, rivals, strict=True)
        )

    def _finish(self, meta: dict[str, Any], reason: dict[str, Any]) -> EngineFinish:
        if reason["type"] not in _REASONS:
            raise EngineFailed(f"the engine ended the request for the unknown reason {reason['type']!r}")
        matched = reason.get("matched")
        facts = (meta.get(FACTS_KEY) or [{}])[-1]
        return EngineFinish(
            reason=_REASONS[reason["type"]],
            matched_token_id=matched if isinstance(matched, int) else None,
            prompt_tokens=meta["prompt_tokens"],
            completion_tokens=meta["completion_tokens"],
            cached_tokens=meta["cached_tokens"],
            recomputed_tokens=facts.get("recomputed_tokens"),
            timings=EngineTimings(**{name: facts.get(name) for name in _TIMINGS}),
        )

    def _error(self, reason: dict[str, Any]) -> TandemError:
        message = _plain(reason.get("message") or "the engine gave the request up")
        if reason.get("status_code") == BAD_REQUEST or "Grammar accept_token failed" in message:
            return self.refused(message)
        if self._request.bootstrap is None:
            return EngineFailed(message)
        whole = str(reason.get("message")).replace("bootstrap_room", "room")
        # SGLang's prefill says "Prefill bootstrap failed", its decode "Decode transfer failed" for either phase.
        phase = "bootstrapping" if any(word in whole for word in _BOOTSTRAP_WORDS) else "transferring"
        return LegFailed(message, phase=phase, room=self._request.bootstrap.room)

    def refused(self, message: str) -> RequestError:
        """A refusal of SGLang's, with the field it is most likely about."""
        plain = _plain(message)
        if "grammar" in plain.lower():
            return self._grammar_refused(plain)
        if any(words in plain for words in _TOO_LONG):
            return ContextExceeded("token_ids", f"{len(self._request.token_ids)} tokens are more than fit")
        field = next((name for word, name in _FIELDS.items() if word in plain.lower()), "token_ids")
        return InvalidRequest(field, plain)

    def _grammar_refused(self, message: str) -> RequestError:
        field = grammars.field_of(self._request.guided)
        if "--grammar-backend none" in message:
            return NotSupported("this engine knows no guided decoding", field=field)
        if "accept_token failed" in message:
            return InvalidRequest(field, "allows nothing after what was generated")
        if grammars.TIMED_OUT in message:
            return InvalidRequest(field, "takes too long to compile")
        _, _, cause = message.partition(" grammar: ")
        return InvalidRequest(field, f"cannot be used: {_COMPILER_PLACE.sub('', cause or message)}")


def _plain(message: str) -> str:
    """The cause alone, on one line."""
    found = _ROOT_CAUSE.search(message)
    return " ".join((found.group(1) if found else message).split())
