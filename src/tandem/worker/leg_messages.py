"""Converts a protobuf LegRequest to an EngineRequest. Pure; the same for both roles."""

from __future__ import annotations

from tandem.api.types.v1 import leg_pb2
from tandem.domain.adapter import Adapter
from tandem.domain.generation import Bootstrap, EngineRequest
from tandem.domain.limits import REQUEST_ID_CHARS_MAX
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest, NotSupported, WrongRole
from tandem.rpc.convert import (
    adapter_from_proto,
    embedding_from_proto,
    guided_from_proto,
    present,
    sampling_from_proto,
    stopping_from_proto,
)
from tandem.worker.legs import LegKey


def leg_key(leg: leg_pb2.LegRequest) -> LegKey:
    """Request id and attempt of a leg.

    Raises:
        InvalidRequest: one of the two is missing or out of range.
    """
    if not 1 <= len(leg.request_id) <= REQUEST_ID_CHARS_MAX:
        raise InvalidRequest("leg.request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters long")
    if leg.attempt < 1:
        raise InvalidRequest("leg.attempt", "must be at least 1")
    return leg.request_id, leg.attempt


def leg_adapter(leg: leg_pb2.LegRequest) -> Adapter | None:
    """The adapter that a leg asks for; None: the model alone."""
    return adapter_from_proto(leg.adapter) if leg.HasField("adapter") else None


def expected_cached_tokens(leg: leg_pb2.LegRequest) -> int:
    """Prompt tokens that the caller expects in the prefix cache.

    Raises:
        InvalidRequest: below 0.
    """
    if leg.expected_cached_tokens < 0:
        raise InvalidRequest("leg.expected_cached_tokens", f"must be at least 0, not {leg.expected_cached_tokens}")
    return leg.expected_cached_tokens


def engine_request(leg: leg_pb2.LegRequest, bootstrap: Bootstrap | None) -> EngineRequest:
    """The engine's request. `bootstrap` is passed separately because each role derives it differently.

    Its id is a label here; `legs` replaces it by one that no other leg has.
    """
    return EngineRequest(
        request_id=leg.request_id,
        token_ids=tuple(leg.token_ids),
        sampling=sampling_from_proto(leg.sampling),
        stopping=stopping_from_proto(leg.stopping),
        guided=guided_from_proto(leg.guided) if leg.HasField("guided") else None,
        top_logprobs=leg.logprobs.top_logprobs if leg.HasField("logprobs") else None,
        prompt_logprobs=leg.logprobs.prompt,
        bootstrap=bootstrap,
        priority=leg.priority,
        cache_salt=present(leg, "cache_salt", leg.cache_salt),
        adapter=leg_adapter(leg),
        embedding=embedding_from_proto(leg.embedding) if leg.HasField("embedding") else None,
    )


def check_task(leg: leg_pb2.LegRequest, worker: Worker) -> None:
    """Reject a leg of another kind than the model's: an engine that embeds would die of a generation.

    Raises:
        NotSupported: names the field.
    """
    about = worker.capabilities
    if leg.HasField("embedding") and not about.embeds:
        raise NotSupported(f"model {about.model} generates, and computes no embeddings", field="model")
    if about.embeds and not leg.HasField("embedding"):
        raise NotSupported(f"model {about.model} computes embeddings, and generates nothing", field="model")


def wrong_role(worker: Worker, sentence: str) -> WrongRole:
    """The error for a leg that is not of the worker's role."""
    return WrongRole(sentence, worker=worker.worker_id, role=worker.role.value)
