"""Workers as a frontend sees them in the registry's view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.domain.worker import LEG_CONTRACT, Capabilities, Worker, WorkerRole

CAPABILITIES = Capabilities(
    engine="simulated",
    engine_version="1",
    model="m",
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    context_tokens_max=2048,
    kv_capacity_tokens=4096,
    running_requests_max=16,
    vocabulary_size=1000,
    eos_token_ids=(1,),
    page_size_tokens=16,
    kv_dtype="float32",
    kv_layout="mha:2x2x32",
    kv_bytes_per_token=1024,
    transfer_backend="nixl",
)


def worker(worker_id: str, role: WorkerRole, **capabilities: Any) -> Worker:
    return Worker(
        worker_id=worker_id,
        epoch=7,
        role=role,
        address=f"127.0.0.1:{1000 + sum(map(ord, worker_id))}",
        capabilities=replace(CAPABILITIES, **capabilities),
        bootstrap_host="127.0.0.1" if role is WorkerRole.PREFILL else None,
        bootstrap_port=9000 if role is WorkerRole.PREFILL else None,
        leg_contract=LEG_CONTRACT,
    )


def prefill(worker_id: str = "prefill-0", **capabilities: Any) -> Worker:
    return worker(worker_id, WorkerRole.PREFILL, **capabilities)


def decode(worker_id: str = "decode-0", **capabilities: Any) -> Worker:
    return worker(worker_id, WorkerRole.DECODE, **capabilities)


def aggregated(worker_id: str = "aggregated-0", **capabilities: Any) -> Worker:
    return worker(worker_id, WorkerRole.AGGREGATED, transfer_backend="none", **capabilities)
