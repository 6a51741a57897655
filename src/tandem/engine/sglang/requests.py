"""Converts an `EngineRequest` to the arguments of SGLang's GenerateReqInput, after checks that SGLang makes too late.

Pure: knows SGLang's names, imports none of it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from typing import Any

from tandem.domain.generation import GRAMMARS, Bootstrap, EmbeddingOptions, EngineRequest, Sampling, Stopping
from tandem.domain.limits import TOP_LOGPROBS_MAX
from tandem.domain.sampling import ENGINE_NAMES, LOGIT_BIAS_MAX
from tandem.domain.worker import WorkerRole
from tandem.engine.sglang.hooks import grammars
from tandem.errors import ContextExceeded, InvalidRequest, NotSupported

_HOST = re.compile(r"[A-Za-z0-9_.:%\[\]-]{1,253}")
ROOM_MAX = 2**63 - 1
FAKE_BOOTSTRAP_HOST = "2.2.2.2"
"""SGLang's constant of the same name: a request with this host has no peer and transfers no KV on any backend."""
CANARY_GREEDY = Sampling(temperature=0.0)
CANARY_DRAWN = Sampling(
    temperature=1.0, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1, seed=1
)
"""Uses every sampling feature that SGLang compiles or loads at first use, so that no client's request waits for it."""
_numbers = itertools.count(1)


def mint_rid(request_id: str) -> str:
    """A request id for SGLang. SGLang's scheduler aborts by id prefix, so each id starts with a unique number of fixed
    width: no id is a prefix of another, whatever the caller's ids are.
    """
    return f"{next(_numbers):012d}-{request_id}"


def check(request: EngineRequest, role: WorkerRole, vocabulary_size: int, context_tokens_max: int) -> None:
    """Reject a request that this engine cannot run.

    Raises:
        InvalidRequest, ContextExceeded: names the field.
    """
    if not request.token_ids:
        raise InvalidRequest("token_ids", "must not be empty")
    # With any of these SGLang indexes out of bounds, which crashes its scheduler and every running request.
    _check_in_vocabulary("token_ids", request.token_ids, vocabulary_size)
    _check_in_vocabulary("stopping.stop_token_ids", request.stopping.stop_token_ids, vocabulary_size)
    _check_in_vocabulary("sampling.logit_bias", request.sampling.logit_bias, vocabulary_size)
    if len(request.token_ids) >= context_tokens_max:
        raise ContextExceeded(
            "token_ids",
            f"has {len(request.token_ids)} tokens, which leaves none to generate in a context of {context_tokens_max}",
            limit=context_tokens_max,
        )
    if request.embedding is not None:
        return
    if request.stopping.max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", f"must be at least 1, not {request.stopping.max_tokens}")
    _check_options(request)
    _check_bootstrap(request, role)


def _check_in_vocabulary(field: str, token_ids: Iterable[int], vocabulary_size: int) -> None:
    wrong = next((t for t in token_ids if not 0 <= t < vocabulary_size), None)
    if wrong is not None:
        raise InvalidRequest(field, f"{wrong} is outside the vocabulary of {vocabulary_size} tokens")


def _check_options(request: EngineRequest) -> None:
    """Checks that SGLang makes only in its scheduler, which then crashes, or in a thread that cannot be stopped."""
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= TOP_LOGPROBS_MAX:
        raise InvalidRequest("logprobs.top_logprobs", f"must be 0 to {TOP_LOGPROBS_MAX}, not {request.top_logprobs}")
    for token_id, bias in request.sampling.logit_bias.items():
        # Written as `not <=` because NaN compares false with everything.
        if not abs(bias) <= LOGIT_BIAS_MAX:
            limit = LOGIT_BIAS_MAX
            problem = f"must be {-limit} to {limit}, not {bias:g} for token {token_id}"
            raise InvalidRequest("sampling.logit_bias", problem)
    if request.guided is not None:
        grammars.check(request.guided)


def _check_bootstrap(request: EngineRequest, role: WorkerRole) -> None:
    pairs = role is not WorkerRole.AGGREGATED
    if pairs and request.bootstrap is None:
        raise InvalidRequest("bootstrap", f"is required on a {role.value} engine")
    if not pairs and request.bootstrap is not None:
        raise InvalidRequest("bootstrap", "must be absent on an aggregated engine")
    if request.bootstrap is None:
        return
    if not 0 < request.bootstrap.room <= ROOM_MAX:
        raise InvalidRequest("bootstrap.room", f"must be 1 to 2**63 - 1, not {request.bootstrap.room}")
    if not _HOST.fullmatch(request.bootstrap.host):
        raise InvalidRequest("bootstrap.host", "is not a host name or address")


def check_seed(request: EngineRequest, extra: dict[str, Any]) -> None:
    """Reject a seed if the engine's arguments bypass `hooks.seeded_sampling`.

    Raises:
        NotSupported: names the field.
    """
    sampling = request.sampling
    if sampling.seed is None:
        return
    if extra.get("speculative_algorithm"):
        raise NotSupported("seeds are not supported with speculative decoding", field="sampling.seed")
    if extra.get("enable_deterministic_inference") and sampling.min_p:
        raise NotSupported("min_p with a seed is not supported in deterministic inference", field="sampling.min_p")


def check_peer(request: EngineRequest, transfer_backend: str) -> None:
    """Reject SGLang's fake bootstrap host in a client's request: decode would generate from KV that never arrived.

    Raises:
        InvalidRequest: names the field.
    """
    bootstrap = request.bootstrap
    if bootstrap is not None and bootstrap.host == FAKE_BOOTSTRAP_HOST and transfer_backend != "fake":
        raise InvalidRequest("bootstrap.host", f"must not be {FAKE_BOOTSTRAP_HOST}, SGLang's fake bootstrap host")


def embedding_canary() -> EngineRequest:
    """The smallest request of a model that embeds. A generation would kill its scheduler."""
    return EngineRequest(
        request_id=f"canary-{next(_numbers)}",
        token_ids=(0,),
        sampling=Sampling(),
        stopping=Stopping(max_tokens=1),
        embedding=EmbeddingOptions(),
    )


def _embedding_arguments(request: EngineRequest, rid: str, *, priorities: bool) -> dict[str, Any]:
    """Keyword arguments of SGLang's EmbeddingReqInput."""
    values: dict[str, Any] = {"rid": rid, "input_ids": list(request.token_ids)}
    if request.embedding is not None and request.embedding.dimensions is not None:
        values["dimensions"] = request.embedding.dimensions
    if priorities:
        values["priority"] = request.priority
    if request.trace_headers:
        values["external_trace_header"] = dict(request.trace_headers)
    return values


def canary(role: WorkerRole, sampling: Sampling) -> EngineRequest:
    """The smallest request that runs the model in `role`."""
    room = random.randrange(1, ROOM_MAX)  # noqa: S311 -- only has to be unique, not secret
    return EngineRequest(
        request_id=f"canary-{room}",
        token_ids=(0,),
        sampling=sampling,
        stopping=Stopping(max_tokens=2, ignore_eos=True),
        bootstrap=None if role is WorkerRole.AGGREGATED else Bootstrap(host=FAKE_BOOTSTRAP_HOST, port=1, room=room),
    )


def arguments(request: EngineRequest, rid: str, context_tokens_max: int, *, priorities: bool) -> dict[str, Any]:
    """Keyword arguments of SGLang's GenerateReqInput, or of its EmbeddingReqInput."""
    if request.embedding is not None:
        return _embedding_arguments(request, rid, priorities=priorities)
    values: dict[str, Any] = {
        "rid": rid,
        "input_ids": list(request.token_ids),
        "sampling_params": _sampling_params(request, context_tokens_max),
        "stream": True,
        "return_logprob": request.top_logprobs is not None,
    }
    if request.prompt_logprobs:
        values["logprob_start_len"] = 0
    if request.top_logprobs:
        values["top_logprobs_num"] = request.top_logprobs
    if request.bootstrap is not None:
        values["bootstrap_host"] = request.bootstrap.host
        values["bootstrap_port"] = request.bootstrap.port
        values["bootstrap_room"] = request.bootstrap.room
    if priorities:
        values["priority"] = request.priority
    if request.cache_salt is not None:
        values["cache_salt"] = request.cache_salt
    if request.adapter is not None:
        values["lora_path"] = request.adapter.engine_id
    if request.trace_headers:
        values["external_trace_header"] = dict(request.trace_headers)
    return values


def _sampling_params(request: EngineRequest, context_tokens_max: int) -> dict[str, Any]:
    stopping = request.stopping
    # SGLang rejects a budget beyond the context; clamp it, so that the generation ends there with LENGTH.
    max_tokens = min(stopping.max_tokens, context_tokens_max - len(request.token_ids))
    values: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "ignore_eos": stopping.ignore_eos,
        **_chosen(request.sampling),
    }
    if stopping.min_tokens is not None:
        values["min_new_tokens"] = min(stopping.min_tokens, max_tokens)
    if stopping.stop_token_ids:
        values["stop_token_ids"] = list(stopping.stop_token_ids)
    if request.guided is not None:
        given = ((name, getattr(request.guided, name)) for name in GRAMMARS)
        values |= {name: grammar for name, grammar in given if grammar is not None}
    return values


def _chosen(sampling: Sampling) -> dict[str, Any]:
    """Only the fields the caller set; SGLang's defaults apply to the rest."""
    given = ((engine_name, getattr(sampling, name)) for name, engine_name in ENGINE_NAMES.items())
    values = {name: value for name, value in given if value is not None}
    if sampling.logit_bias:
        values["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    return values
