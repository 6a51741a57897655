"""From SGLang's outputs of a step to what an `Output` takes: each token once, then the one ending or error.

Pure: knows SGLang's names, imports none of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tandem.domain.generation import (
    EngineFinish,
    EngineRequest,
    EngineTimings,
    FinishReason,
    KvCheck,
    TokenLogprob,
)
from tandem.domain.sampling import ENGINE_NAMES
from tandem.engine.port import Output
from tandem.engine.sglang.hooks import grammars
from tandem.errors import (
    ContextExceeded,
    EngineFailed,
    InvalidRequest,
    KvCorrupt,
    LegFailed,
    NotSupported,
    RequestError,
    TandemError,
)

BAD_REQUEST = 400
_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
_KV_CHECKS = {None: None, True: KvCheck.MATCHED, False: KvCheck.UNCHECKED}
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
    **{engine_name: f"sampling.{name}" for name, engine_name in ENGINE_NAMES.items() if name != "seed"},
    "logit_bias": "sampling.logit_bias",
    "min_new_tokens": "stopping.min_tokens",
    "max_new_tokens": "stopping.max_tokens",
    "logprob": "logprobs.top_logprobs",
    "priority": "priority",
    "dimension": "embedding.dimensions",
    "bootstrap": "bootstrap",
}
"""Words in SGLang's refusals, and the field each one is about."""
_ROOT_CAUSE = re.compile(r"KVTransferError\([^)]*\): (.*)$", re.DOTALL)
_TOO_LONG = ("maximum allowed length", "model's context length")
_COMPILER_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
"""What XGrammar puts before its sentence: a time, and a line of its own source."""
_PEER_WORDS = "decode-side abort"
_CORRUPT_WORDS = ("KV checksum mismatch", "Metadata corruption")
"""What SGLang's decode says where the KV, or the metadata that comes with it, is not that of the request."""
_BOOTSTRAP_WORDS = ("bootstrap", "Could not fetch", "parallel info")


class Answers:
    """The answers to one request, on their way to its output."""

    def __init__(
        self, request: EngineRequest, rid: str, output: Output, on_end: Callable[[EngineRequest], None]
    ) -> None:
        """`rid` is SGLang's id of the request; `on_end` is called once, before the output's end."""
        self.rid = rid
        self._request = request
        self._output = output
        self._on_end = on_end
        self._sent_count = 0
        self._is_over = False
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def tokens(self, token_ids: Sequence[int], batch: Any, i: int) -> None:
        """Tokens of one step. `batch` is SGLang's BatchTokenIDOutput, and `i` the request's row in it.

        Raises:
            EngineFailed: there are not as many log probabilities as tokens. Other errors: the row is no row at all.
        """
        if self._is_over:
            return
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._request.top_logprobs is not None:
            logprobs = self._logprobs(batch, i, len(token_ids))
        if self._request.prompt_logprobs and batch.input_token_logprobs_val[i]:
            self._prompt_logprobs = self._of_prompt(batch, i)
        self._sent_count += len(token_ids)
        self._output.tokens(token_ids, logprobs)

    def end(self, reason: dict[str, Any], batch: Any, i: int, facts: Sequence[dict[str, Any]] | None) -> None:
        """The engine has ended the request. `facts` is what `hooks` noted of it."""
        if reason["type"] == "abort":
            self.broke(reason)
        elif reason["type"] not in _REASONS:
            self.fail(EngineFailed(f"the engine ended the request for the unknown reason {reason['type']!r}"))
        else:
            finish = _finish(reason, batch, i, facts[-1] if facts else {})
            self._finish(replace(finish, prompt_logprobs=self._prompt_logprobs))

    def embedded(self, batch: Any, i: int) -> None:
        """The embedding of the request. `batch` is SGLang's BatchEmbeddingOutput, and `i` the request's row in it.

        Raises:
            EngineFailed: it is none. Other errors: the row is no row at all.
        """
        reason = batch.finished_reasons[i]
        if reason["type"] == "abort":
            self.broke(reason)
            return
        row = batch.embeddings[i]
        if not isinstance(row, list) or not all(isinstance(value, float) and math.isfinite(value) for value in row):
            raise EngineFailed("the engine sent something else than an embedding of finite numbers")
        self._finish(
            EngineFinish(
                reason=FinishReason.STOP,
                prompt_tokens=batch.prompt_tokens[i],
                cached_tokens=batch.cached_tokens[i],
                embedding=tuple(row),
            )
        )

    def broke(self, reason: dict[str, Any]) -> None:
        """The engine has given the request up, and says why."""
        self.fail(self._error(reason))

    def abort(self) -> None:
        """This side has given the request up."""
        self._finish(
            EngineFinish(
                reason=FinishReason.ABORTED,
                prompt_tokens=len(self._request.token_ids),
                completion_tokens=self._sent_count,
            )
        )

    def fail(self, problem: TandemError) -> None:
        """The request ends with an error. Nothing after the end counts."""
        if not self._is_over:
            self._is_over = True
            self._on_end(self._request)
            self._output.fail(problem)

    def _finish(self, finish: EngineFinish) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_end(self._request)
            self._output.finish(finish)

    def _logprobs(self, batch: Any, i: int, count: int) -> tuple[TokenLogprob, ...]:
        chosen, token_ids = batch.output_token_logprobs_val[i], batch.output_token_logprobs_idx[i]
        rivals: Sequence[Any] = [((), ())] * count
        if self._request.top_logprobs:
            rivals = list(zip(batch.output_top_logprobs_val[i], batch.output_top_logprobs_idx[i], strict=True))
        if not len(chosen) == len(token_ids) == len(rivals) == count:
            raise EngineFailed(f"the engine sent {len(chosen)} log probabilities with {count} tokens")
        return tuple(
            TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(ids or (), values or (), strict=True)))
            for logprob, token_id, (values, ids) in zip(chosen, token_ids, rivals, strict=True)
        )

    def _of_prompt(self, batch: Any, i: int) -> tuple[TokenLogprob, ...]:
        """Those of the prompt, which SGLang sends once, with the first tokens. Its first token has none."""
        values, token_ids = batch.input_token_logprobs_val[i], batch.input_token_logprobs_idx[i]
        rivals: Sequence[Any] = [((), ())] * len(values)
        if self._request.top_logprobs:
            rivals = list(zip(batch.input_top_logprobs_val[i], batch.input_top_logprobs_idx[i], strict=True))
        if tuple(token_ids) != self._request.token_ids or len(values) != len(rivals):
            raise EngineFailed(f"the engine sent {len(token_ids)} log probabilities of another prompt")
        return tuple(
            TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(ids or (), tops or (), strict=True)))
            for logprob, token_id, (tops, ids) in zip(values[1:], token_ids[1:], rivals[1:], strict=True)
        )

    def _error(self, reason: dict[str, Any]) -> TandemError:
        message = _plain(reason.get("message") or "the engine gave the request up")
        if reason.get("status_code") == BAD_REQUEST or "Grammar accept_token failed" in message:
            return self.refused(message)
        if self._request.bootstrap is None:
            return EngineFailed(message)
        whole = str(reason.get("message")).replace("bootstrap_room", "room")
        if is_corrupt(reason):
            problem = "the KV that arrived is not what the prefill engine sent"
            return KvCorrupt(problem, phase="transferring", room=self._request.bootstrap.room)
        # SGLang's prefill says "Prefill bootstrap failed", its decode "Decode transfer failed" for either phase.
        phase = "bootstrapping" if any(word in whole for word in _BOOTSTRAP_WORDS) else "transferring"
        # A prefill engine that its peer has notified of an abort has not failed itself.
        cause = {"cause": LegFailed.PEER_ABORTED} if _PEER_WORDS in whole else {}
        return LegFailed(message, phase=phase, room=self._request.bootstrap.room, **cause)

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


def is_corrupt(reason: dict[str, Any] | None) -> bool:
    """Whether the engine has dropped a request because of its KV; the token that came with it counts for nothing."""
    message = "" if reason is None else str(reason.get("message"))
    return any(words in message for words in _CORRUPT_WORDS)


def _finish(reason: dict[str, Any], batch: Any, i: int, facts: dict[str, Any]) -> EngineFinish:
    matched = reason.get("matched")
    return EngineFinish(
        reason=_REASONS[reason["type"]],
        matched_token_id=matched if isinstance(matched, int) else None,
        prompt_tokens=batch.prompt_tokens[i],
        completion_tokens=batch.completion_tokens[i],
        cached_tokens=batch.cached_tokens[i],
        recomputed_tokens=facts.get("recomputed_tokens"),
        kv_check=_KV_CHECKS[facts.get("kv_checked")],
        timings=EngineTimings(**{name: facts.get(name) for name in _TIMINGS}),
    )


def _plain(message: str) -> str:
    """The cause alone, on one line."""
    found = _ROOT_CAUSE.search(message)
    return " ".join((found.group(1) if found else message).split())
