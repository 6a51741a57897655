"""The choice of workers as a comparison of every pair, written for clarity and not for speed: pools are held to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tandem.domain.worker import LEG_CONTRACT, Start, Worker, WorkerRole, WorkerState, incompatible_field
from tandem.errors import ContextExceeded, IncompatibleWorkers, NoWorkers, TandemError

Possible = Mapping[Start, frozenset[Start] | None]
"""Prefill workers by the worker that streams; None: it needs none."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a choice may result in."""

    possible: Possible
    every: Possible
    """Before anything was avoided."""
    ejected: tuple[str, ...]


def possible(workers: Iterable[Worker], digest: str, prompt_tokens: int = -1, contract: int | None = None) -> Possible:
    """What could serve a prompt of the model "m"; `contract` None: whatever leg contract a worker speaks."""
    able = [
        worker
        for worker in workers
        if worker.capabilities.model == "m"
        and worker.state is WorkerState.SERVING
        and worker.capabilities.tokenizer_digest == digest
        and contract in (None, worker.leg_contract)
        and worker.capabilities.context_tokens_max > prompt_tokens
    ]
    prefills = [worker for worker in able if worker.role is WorkerRole.PREFILL]
    found: dict[Start, frozenset[Start] | None] = {}
    for worker in able:
        if worker.role is WorkerRole.AGGREGATED:
            found[worker.start] = None
        elif worker.role is WorkerRole.DECODE:
            fitting = [p for p in prefills if incompatible_field(p.capabilities, worker.capabilities) is None]
            if fitting:
                found[worker.start] = frozenset(prefill.start for prefill in fitting)
    return found


def without(all_of: Possible, avoided: Collection[Start]) -> Possible:
    left: dict[Start, frozenset[Start] | None] = {}
    for stream, prefills in all_of.items():
        rest = None if prefills is None else prefills - set(avoided)
        if stream not in avoided and (rest is None or rest):
            left[stream] = rest
    return left


def count(all_of: Possible) -> int:
    return sum(1 if prefills is None else len(prefills) for prefills in all_of.values())


def names(all_of: Possible) -> set[str]:
    return {worker_id for stream, prefills in all_of.items() for worker_id, _ in (stream, *(prefills or ()))}


def preferred(every: Possible, avoiding: Mapping[str, Collection[Start]]) -> Expected:
    """Avoid one kind after the other, as long as something is left."""
    left, ejected = every, []
    for name, avoided in avoiding.items():
        narrower = without(left, avoided)
        if narrower and narrower != left:
            left = narrower
            ejected.append(name)
    return Expected(left, every, tuple(ejected))


def problem(workers: Collection[Worker], digest: str, prompt_tokens: int) -> type[TandemError] | None:
    """With what a first attempt is refused; None: it is not."""
    if possible(workers, digest, prompt_tokens, LEG_CONTRACT):
        return None
    if possible(workers, digest, contract=LEG_CONTRACT):
        return ContextExceeded
    serving = [w for w in workers if w.capabilities.model == "m" and w.state is WorkerState.SERVING]
    readers = [worker for worker in serving if worker.capabilities.tokenizer_digest == digest]
    roles = {worker.role for worker in readers if worker.leg_contract == LEG_CONTRACT}
    has_both = roles >= {WorkerRole.PREFILL, WorkerRole.DECODE}
    if (serving and not readers) or possible(workers, digest) or has_both:
        return IncompatibleWorkers
    return NoWorkers


def foreigners(workers: Collection[Worker], digest: str) -> set[str]:
    """Workers of another leg contract that would be part of a route if it did not count."""
    part = names(possible(workers, digest))
    return {w.worker_id for w in workers if w.worker_id in part and w.leg_contract != LEG_CONTRACT}
