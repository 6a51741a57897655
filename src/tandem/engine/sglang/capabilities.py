"""Converts SGLang's start-up message to Capabilities, and its load snapshots to EngineLoad.

Pure: knows SGLang's names, imports none of it. Sizes of the model come from the checkpoint, sizes of the KV pool from
the scheduler that allocated it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tandem.domain.checkpoint import Checkpoint
from tandem.domain.worker import Capabilities, EngineLoad, WorkerRole
from tandem.engine.settings import EngineSettings, embedding_capabilities
from tandem.engine.sglang.compat import SGLANG_VERSION
from tandem.engine.sglang.hooks.scheduler_hooks import FACTS_KEY


def capabilities(
    settings: EngineSettings, checkpoint: Checkpoint, server_args: Any, info: dict[str, Any]
) -> Capabilities:
    """Capabilities from the settings, the checkpoint and the scheduler's start-up message."""
    facts = info[FACTS_KEY]
    aggregated = settings.role is WorkerRole.AGGREGATED
    return Capabilities(
        engine="sglang",
        engine_version=SGLANG_VERSION,
        model=settings.model_name,
        model_digest=checkpoint.model_digest,
        tokenizer_digest=checkpoint.tokenizer_digest,
        context_tokens_max=facts["context_tokens_max"][settings.role.value],
        kv_capacity_tokens=info["max_total_num_tokens"],
        running_requests_max=facts["running_requests_max"],
        vocabulary_size=checkpoint.vocabulary_size,
        eos_token_ids=checkpoint.eos_token_ids,
        page_size_tokens=facts["page_size_tokens"],
        kv_dtype=facts["kv_dtype"],
        kv_layout=checkpoint.kv_layout,
        kv_bytes_per_token=facts["kv_bytes_per_token"],
        transfer_backend="none" if aggregated else settings.transfer_backend,
        tensor_parallel_size=server_args.tp_size,
        is_mla=checkpoint.is_mla,
        unequal_tp=takes_unequal_tp(settings, checkpoint, server_args),
        **embedding_capabilities(settings, checkpoint),
    )


UNEQUAL_TP_SIZES = (1, 2)
"""SGLang lists a prefill engine's own slices once, for the first size of decode that it meets: with these there is only
one size other than its own."""


def takes_unequal_tp(settings: EngineSettings, checkpoint: Checkpoint, server_args: Any) -> bool:
    """Whether NIXL can carry this engine's KV to or from another number of ranks: each has the same number of KV heads,
    and the whole model. Latent attention has a rule of its own; other layers were not tried.
    """
    if settings.role is WorkerRole.AGGREGATED or settings.transfer_backend != "nixl" or checkpoint.is_mla:
        return False
    is_wanted = server_args.device == "cpu" if settings.unequal_tp is None else settings.unequal_tp
    if (server_args.pp_size, server_args.dp_size) != (1, 1) or server_args.tp_size not in UNEQUAL_TP_SIZES:
        return False
    layers = set(checkpoint.config.get("layer_types") or ())
    return is_wanted and layers <= {"full_attention"} and checkpoint.kv_heads % server_args.tp_size == 0


def load(snapshots: Iterable[Any], role: WorkerRole) -> EngineLoad:
    """The scheduler's latest load, summed over data-parallel ranks; every field is None before the first snapshot."""
    # SGLang first writes an empty snapshot, with timestamp 0.
    every = [s for s in snapshots if s.timestamp > 0]
    if not every:
        return EngineLoad()
    return EngineLoad(
        running_requests=sum(s.num_running_reqs for s in every),
        waiting_requests=sum(_waiting(s) for s in every),
        waiting_tokens=sum(s.num_waiting_uncached_tokens for s in every),
        kv_used_tokens=sum(s.num_used_tokens for s in every),
        kv_capacity_tokens=sum(s.max_total_num_tokens for s in every),
        transferring_requests=None if role is WorkerRole.AGGREGATED else sum(_transferring(s, role) for s in every),
        kv_transferring_tokens=_sum(s.kv_transferring_tokens for s in every),
        kv_cached_tokens=_sum(s.kv_cached_tokens for s in every),
        kv_free_tokens=_sum(s.kv_free_tokens for s in every),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    """Sum over all ranks; None if any rank does not report the value."""
    reported = list(values)
    return None if None in reported else sum(value for value in reported if value is not None)


def _waiting(snapshot: Any) -> int:
    """Requests that wait for this engine, not for the other leg."""
    queues = snapshot.queues
    return 0 if queues is None else int(queues.waiting + queues.grammar + queues.retracted)


def _transferring(snapshot: Any, role: WorkerRole) -> int:
    d = snapshot.disaggregation
    if d is None:
        return 0
    if role is WorkerRole.PREFILL:
        return int(d.prefill_bootstrap_queue_reqs + d.prefill_inflight_queue_reqs)
    return int(d.decode_prealloc_queue_reqs + d.decode_transfer_queue_reqs)
