"""Protobuf messages to value types and back, for all calls between Tandem's processes.

Pure translation: sets no defaults and validates nothing.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

from google.protobuf import timestamp_pb2
from google.protobuf.message import Message

from tandem.api.types.v1 import generation_pb2, leg_pb2, sampling_pb2, worker_pb2
from tandem.api.worker.v1 import worker_service_pb2
from tandem.domain.adapter import Adapter
from tandem.domain.frontend import Frontend
from tandem.domain.generation import (
    GRAMMARS,
    Bootstrap,
    EmbeddingOptions,
    EngineFinish,
    FinishReason,
    Guided,
    KvCheck,
    Sampling,
    Stopping,
    TokenLogprob,
)
from tandem.domain.placement import Placement
from tandem.domain.sampling import SCALARS
from tandem.domain.worker import (
    Capabilities,
    EngineLoad,
    UnfinishedPrompts,
    Worker,
    WorkerRole,
    WorkerState,
    field_names,
)

T = TypeVar("T")

PLACEMENTS = {placement: generation_pb2.Placement.Value(f"PLACEMENT_{placement.name}") for placement in Placement}

ROLES = {
    WorkerRole.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    WorkerRole.AGGREGATED: worker_pb2.WORKER_ROLE_AGGREGATED,
}
STATES = {
    WorkerState.SERVING: worker_pb2.WORKER_STATE_SERVING,
    WorkerState.DRAINING: worker_pb2.WORKER_STATE_DRAINING,
}
FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: generation_pb2.FINISH_REASON_ABORTED,
}
KV_CHECKS = {check: generation_pb2.KvCheck.Value(f"KV_CHECK_{check.name}") for check in KvCheck}
ROLE_BY_NUMBER = {number: role for role, number in ROLES.items()}
STATE_BY_NUMBER = {number: state for state, number in STATES.items()}

TIMES = (
    "queued",
    "bootstrap_end",
    "preallocation_end",
    "prefill_start",
    "prefill_end",
    "kv_transfer_start",
    "kv_transfer_end",
    "first_token",
)
COUNTED_BY_WORKER = ("computed_tokens", "unfinished")
LOAD_FIELDS = tuple(field.name for field in fields(EngineLoad) if field.name not in COUNTED_BY_WORKER)
"""Those of the engine."""


def present(message: Message, field: str, value: T) -> T | None:
    """The value of an `optional` field, None when it is absent."""
    return value if message.HasField(field) else None


def timestamp(time_s: float) -> timestamp_pb2.Timestamp:
    """Seconds since the Unix epoch as a Timestamp."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromNanoseconds(int(time_s * 1e9))
    return stamp


def seconds(stamp: timestamp_pb2.Timestamp) -> float:
    """A Timestamp as seconds since the Unix epoch."""
    return stamp.ToNanoseconds() / 1e9


def worker_to_proto(worker: Worker) -> worker_pb2.Worker:
    """One start of a worker."""
    capabilities = {name: getattr(worker.capabilities, name) for name in field_names()}
    message = worker_pb2.Worker(
        worker_id=worker.worker_id,
        epoch=worker.epoch,
        role=ROLES[worker.role],
        address=worker.address,
        capabilities=worker_pb2.WorkerCapabilities(**capabilities),
        state=STATES[worker.state],
        capabilities_digest=worker.capabilities_digest,
        release=worker.release,
        leg_contract=worker.leg_contract,
        adapters=map(adapter_to_proto, worker.adapters),
    )
    if worker.bootstrap_host is not None and worker.bootstrap_port is not None:
        message.bootstrap.host = worker.bootstrap_host
        message.bootstrap.port = worker.bootstrap_port
    return message


def worker_from_proto(message: worker_pb2.Worker) -> Worker:
    """One start of a worker. KeyError for a role or state this release does not know."""
    capabilities = {name: getattr(message.capabilities, name) for name in field_names()}
    for name in ("eos_token_ids", "embedding_sizes"):
        capabilities[name] = tuple(capabilities[name])
    has_bootstrap = message.HasField("bootstrap")
    return Worker(
        worker_id=message.worker_id,
        epoch=message.epoch,
        role=ROLE_BY_NUMBER[message.role],
        address=message.address,
        capabilities=Capabilities(**capabilities),
        bootstrap_host=message.bootstrap.host if has_bootstrap else None,
        bootstrap_port=message.bootstrap.port if has_bootstrap else None,
        state=STATE_BY_NUMBER[message.state],
        capabilities_digest=present(message, "capabilities_digest", message.capabilities_digest),
        release=message.release,
        leg_contract=message.leg_contract if message.HasField("leg_contract") else 1,
        adapters=tuple(map(adapter_from_proto, message.adapters)),
    )


def adapter_to_proto(adapter: Adapter) -> worker_pb2.Adapter:
    """One adapter."""
    return worker_pb2.Adapter(name=adapter.name, digest=adapter.digest)


def adapter_from_proto(message: worker_pb2.Adapter) -> Adapter:
    """One adapter."""
    return Adapter(message.name, message.digest)


def frontend_to_proto(frontend: Frontend) -> worker_pb2.Frontend:
    """One start of a frontend."""
    return worker_pb2.Frontend(
        frontend_id=frontend.frontend_id,
        epoch=frontend.epoch,
        address=frontend.address,
        model=frontend.model,
        state=STATES[frontend.state],
        release=frontend.release,
    )


def frontend_from_proto(message: worker_pb2.Frontend) -> Frontend:
    """One start of a frontend. KeyError for a state this release does not know."""
    return Frontend(
        frontend_id=message.frontend_id,
        epoch=message.epoch,
        address=message.address,
        model=message.model,
        state=STATE_BY_NUMBER[message.state],
        release=message.release,
    )


def load_figures(load: EngineLoad) -> dict[str, int | None]:
    """A load as keyword arguments of WatchLoadResponse."""
    return {name: getattr(load, name) for name in LOAD_FIELDS}


def unfinished_figures(unfinished: UnfinishedPrompts | None) -> dict[str, int]:
    """Unfinished prompts as keyword arguments of WatchLoadResponse."""
    if unfinished is None:
        return {}
    return {
        "unfinished_prompts": unfinished.count,
        "unfinished_tokens": unfinished.tokens,
        "in_hand_ms": round(unfinished.in_hand_s * 1_000),
    }


def load_from_proto(message: worker_service_pb2.WatchLoadResponse) -> EngineLoad:
    """A load; fields that the engine does not report are None."""
    computed = None
    if message.HasField("prompt_tokens"):
        computed = message.prompt_tokens - message.cached_tokens
    values = {name: present(message, name, getattr(message, name)) for name in LOAD_FIELDS}
    unfinished = None
    if message.HasField("unfinished_prompts"):
        in_hand_s = message.in_hand_ms / 1_000
        unfinished = UnfinishedPrompts(message.unfinished_prompts, message.unfinished_tokens, in_hand_s)
    return EngineLoad(**values, computed_tokens=computed, unfinished=unfinished)


def placement_to_proto(placement: Placement | None) -> generation_pb2.Placement.ValueType:
    """Why a pair, or an aggregated worker; UNSPECIFIED for None."""
    return generation_pb2.PLACEMENT_UNSPECIFIED if placement is None else PLACEMENTS[placement]


def kv_check_text(number: generation_pb2.KvCheck.ValueType) -> str:
    """What follows the number of KV bytes in a line for a person; empty: nothing is known."""
    texts = {KV_CHECKS[KvCheck.MATCHED]: ", checked", KV_CHECKS[KvCheck.UNCHECKED]: ", not checked"}
    return texts.get(number, "")


def placement_text(number: generation_pb2.Placement.ValueType) -> str:
    """A placement in words, such as "short prompt"; "" for UNSPECIFIED."""
    if number == generation_pb2.PLACEMENT_UNSPECIFIED:
        return ""
    return generation_pb2.Placement.Name(number).removeprefix("PLACEMENT_").lower().replace("_", " ")


def sampling_from_proto(message: sampling_pb2.Sampling) -> Sampling:
    """Absent fields become None."""
    scalars = {name: getattr(message, name) for name in SCALARS if message.HasField(name)}  # type: ignore[arg-type]
    return Sampling(**scalars, logit_bias=dict(message.logit_bias))


def stopping_from_proto(message: sampling_pb2.Stopping) -> Stopping:
    """The engine's part of stopping."""
    return Stopping(
        max_tokens=message.max_tokens,
        min_tokens=present(message, "min_tokens", message.min_tokens),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def guided_to_proto(guided: Guided) -> sampling_pb2.Guided:
    """The one grammar that is set."""
    given = {name: getattr(guided, name) for name in GRAMMARS if getattr(guided, name) is not None}
    return sampling_pb2.Guided(**given)


def guided_from_proto(message: sampling_pb2.Guided) -> Guided | None:
    """The one grammar that is set; None when the message is empty."""
    kind = message.WhichOneof("grammar")
    return None if kind is None else Guided(**{kind: getattr(message, kind)})


def embedding_from_proto(message: leg_pb2.EmbeddingOptions) -> EmbeddingOptions:
    """How an embedding is computed."""
    return EmbeddingOptions(dimensions=present(message, "dimensions", message.dimensions))


def bootstrap_from_proto(message: leg_pb2.Bootstrap) -> Bootstrap:
    """The bootstrap address and room by which the legs find each other."""
    return Bootstrap(host=message.host, port=message.port, room=message.room)


def logprob_to_proto(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    """One token's log probability with its top alternatives."""
    top = [generation_pb2.RankedToken(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return generation_pb2.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def finish_to_proto(finish: EngineFinish) -> leg_pb2.LegFinish:
    """The finish of a leg."""
    message = leg_pb2.LegFinish(
        reason=FINISH_REASONS[finish.reason],
        matched_token_id=finish.matched_token_id,
        usage=generation_pb2.Usage(
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            cached_tokens=finish.cached_tokens,
        ),
        timings=leg_pb2.LegTimings(recomputed_tokens=finish.recomputed_tokens),
        prompt_logprobs=map(logprob_to_proto, finish.prompt_logprobs),
        embedding=finish.embedding,
    )
    if finish.kv_check is not None:
        message.timings.kv_check = KV_CHECKS[finish.kv_check]
    if finish.timings is not None:
        message.timings.MergeFrom(leg_pb2.LegTimings(kv_transfer_bytes=finish.timings.kv_transfer_bytes))
        for name in TIMES:
            time_s = getattr(finish.timings, f"{name}_time_s")
            if time_s is not None:
                getattr(message.timings, f"{name}_time").CopyFrom(timestamp(time_s))
    return message
