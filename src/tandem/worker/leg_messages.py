"""A leg on the wire: LegRequest to the engine's request, the engine's batches to leg events.

Pure translation, the same for both roles; the response types differ in name only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from tandem.api.types.v1 import leg_pb2
from tandem.errors import InvalidRequest
from tandem.model.generation import Bootstrap, EngineRequest, TokenBatch
from tandem.model.request_state import Phase
from tandem.model.worker import Worker, WorkerRole
from tandem.rpc.messages import (
    PHASES,
    finish_to_proto,
    guided_from_proto,
    logprob_to_proto,
    present,
    sampling_from_proto,
    stopping_from_proto,
)
from tandem.worker.legs import LegKey
from tandem.worker.silences import with_silences

REQUEST_ID_CHARS_MAX = 128


def leg_key(leg: leg_pb2.LegRequest) -> LegKey:
    """Which attempt of which request.

    Raises:
        InvalidRequest: one of the two is missing.
    """
    if not 1 <= len(leg.request_id) <= REQUEST_ID_CHARS_MAX:
        raise InvalidRequest("leg.request_id", f"must be 1 to {REQUEST_ID_CHARS_MAX} characters long")
    if leg.attempt < 1:
        raise InvalidRequest("leg.attempt", "must be 1 or more")
    return leg.request_id, leg.attempt


def engine_request(leg: leg_pb2.LegRequest, bootstrap: Bootstrap | None) -> EngineRequest:
    """What the engine is asked for. `bootstrap` is given apart: each role has its own rule for it."""
    return EngineRequest(
        request_id=f"{leg.request_id}.{leg.attempt}",
        token_ids=tuple(leg.token_ids),
        sampling=sampling_from_proto(leg.sampling),
        stopping=stopping_from_proto(leg.stopping),
        guided=guided_from_proto(leg.guided) if leg.HasField("guided") else None,
        top_logprobs=leg.logprobs.top_logprobs if leg.HasField("logprobs") else None,
        bootstrap=bootstrap,
        priority=leg.priority,
        cache_salt=present(leg, "cache_salt", leg.cache_salt),
    )


def accepted(worker: Worker, leg: leg_pb2.LegRequest) -> leg_pb2.LegAccepted:
    """The first event of every leg: it was admitted, so the epoch it names is the worker's."""
    return leg_pb2.LegAccepted(worker_id=worker.worker_id, epoch=leg.worker_epoch)


async def leg_events(
    batches: AsyncIterator[TokenBatch], role: WorkerRole, on_left: Callable[[], None] = lambda: None
) -> AsyncGenerator[dict[str, Any], None]:
    """Each event after `accepted`, as the keyword arguments of PrefillResponse or DecodeResponse.

    A leg that waits says so several times a second: silence means that its worker is frozen or gone. `on_left` is
    called when whoever reads this has left, before the leg is aborted.
    """
    index = 0
    phase = Phase.PREFILLING if role is WorkerRole.AGGREGATED else Phase.BOOTSTRAPPING
    async with contextlib.aclosing(with_silences(batches, on_left=on_left)) as steps:
        async for batch in steps:
            if batch is None:
                yield {"progress": leg_pb2.LegProgress(phase=PHASES[phase])}
                continue
            if batch.token_ids:
                phase = Phase.TRANSFERRING if role is WorkerRole.PREFILL else Phase.DECODING
                logprobs = [logprob_to_proto(logprob) for logprob in batch.logprobs]
                yield {"tokens": leg_pb2.LegTokens(index=index, token_ids=batch.token_ids, logprobs=logprobs)}
                index += len(batch.token_ids)
            if batch.finish is not None:
                yield {"finish": finish_to_proto(batch.finish)}
