"""Workers and frontends as the unit tests of membership make them: whole, but only what a test names matters."""

from __future__ import annotations

from tandem_registry.view import View

from tandem.domain.frontend import Frontend, Member
from tandem.domain.worker import LEG_CONTRACT, Capabilities, Worker, WorkerRole, WorkerState


def members_of(view: View) -> list[Member]:
    """The workers of a view, then its frontends."""
    return [*(entry.member for entry in view.workers), *(entry.member for entry in view.frontends)]


def make_worker(
    worker_id: str = "decode-0",
    epoch: int = 1,
    address: str | None = None,
    *,
    model: str = "tiny",
    state: WorkerState = WorkerState.SERVING,
    role: WorkerRole = WorkerRole.DECODE,
) -> Worker:
    capabilities = Capabilities(
        engine="simulated",
        engine_version="1",
        model=model,
        model_digest="m",
        tokenizer_digest="t",
        context_tokens_max=2048,
        kv_capacity_tokens=4096,
        running_requests_max=8,
        vocabulary_size=512,
        eos_token_ids=(2,),
        page_size_tokens=1,
        kv_dtype="float32",
        kv_layout="mha:2x2x32",
        kv_bytes_per_token=1024,
        transfer_backend="simulated",
    )
    return Worker(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        address=address or f"{worker_id}:1",
        capabilities=capabilities,
        state=state,
        leg_contract=LEG_CONTRACT,
    )


def make_frontend(frontend_id: str = "frontend-0", epoch: int = 1, address: str | None = None) -> Frontend:
    return Frontend(frontend_id=frontend_id, epoch=epoch, address=address or f"{frontend_id}:2", model="tiny")
