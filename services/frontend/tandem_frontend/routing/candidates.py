"""The result of routing: a route with the facts of its selection, or the error that says why there is none.

Pure. Owns the texts of those errors; `pools` knows which routes exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tandem.domain.placement import Placement
from tandem.domain.worker import (
    LEG_CONTRACT,
    Worker,
    WorkerRole,
    WorkerState,
    accepted_keys,
    incompatible_field,
    offered_keys,
)
from tandem.errors import IncompatibleWorkers, NoWorkers, ServiceError


@dataclass(frozen=True, slots=True)
class Pick:
    """How a route was selected, for traces."""

    candidates_count: int = 0
    """Pairs and aggregated workers that were possible."""
    candidates: str = ""
    """Some of the workers among them, by name."""
    policy: str = ""
    """Name of the policy that picked the worker that computes the prompt."""
    why: str = ""
    """One sentence."""


@dataclass(frozen=True, slots=True)
class Route:
    """The workers of one attempt."""

    decode: Worker
    """A decode worker, or an aggregated one."""
    prefill: Worker | None
    """None on an aggregated route."""
    pick: Pick = field(default=Pick(), compare=False)
    expected_cached_tokens: int | None = field(default=None, compare=False)
    """Prompt tokens that should be in the prefix cache of the worker that computes the prompt; None: unknown."""
    placement: Placement | None = field(default=None, compare=False)
    """Why a pair, or an aggregated worker; None: workers of one kind only serve the model, or nothing decides."""

    @property
    def computing(self) -> Worker:
        """The worker that computes the prompt."""
        return self.prefill or self.decode

    @property
    def workers(self) -> tuple[Worker, ...]:
        """One or two workers, prefill first."""
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


Explain = Callable[[Sequence[Worker], str, str], Callable[[], ServiceError]]
"""Makes the error of a view without a route; see `why_none`."""


def why_none(workers: Iterable[Worker], model: str, tokenizer_digest: str) -> Callable[[], ServiceError]:
    """Explain why no worker and no pair of workers can serve a model, given a view in which that is so.

    Returns:
        A function that creates the error. NoWorkers: a role is missing. IncompatibleWorkers: workers exist, but no
        prefill worker is compatible with a decode worker, or all have another tokenizer than this frontend, or one
        that is needed has another leg contract.
    """
    serving = [w for w in workers if w.capabilities.model == model and w.state is WorkerState.SERVING]
    readers = [w for w in serving if w.capabilities.tokenizer_digest == tokenizer_digest]
    if serving and not readers:
        return partial(
            IncompatibleWorkers,
            f"all {len(serving)} workers of model {model} have another tokenizer than this frontend",
            field="tokenizer_digest",
        )
    foreign = _needed_foreigner(readers)
    if foreign is not None:
        return partial(
            IncompatibleWorkers,
            f"no route for model {model}: worker {foreign.worker_id} has leg contract {foreign.leg_contract}, "
            f"this frontend needs {LEG_CONTRACT}",
            field="leg_contract",
            worker=foreign.worker_id,
        )
    return _no_pair([worker for worker in readers if worker.leg_contract == LEG_CONTRACT], model)


def _needed_foreigner(readers: Sequence[Worker]) -> Worker | None:
    """A worker that would be part of a route if it had this frontend's leg contract."""
    offered, accepted = set[object](), set[object]()
    for worker in readers:
        if worker.role is WorkerRole.PREFILL:
            offered.update(offered_keys(worker.capabilities))
        elif worker.role is WorkerRole.DECODE:
            accepted.update(accepted_keys(worker.capabilities))
    for worker in readers:
        if worker.leg_contract == LEG_CONTRACT:
            continue
        if worker.role is WorkerRole.AGGREGATED:
            return worker
        is_prefill = worker.role is WorkerRole.PREFILL
        own, others = (offered_keys, accepted) if is_prefill else (accepted_keys, offered)
        if not others.isdisjoint(own(worker.capabilities)):
            return worker
    return None


def _no_pair(workers: Sequence[Worker], model: str) -> Callable[[], ServiceError]:
    prefills = [worker for worker in workers if worker.role is WorkerRole.PREFILL]
    decodes = [worker for worker in workers if worker.role is WorkerRole.DECODE]
    if not prefills and not decodes:
        return partial(NoWorkers, f"no worker serves model {model} now", role="any", model=model)
    if not prefills or not decodes:
        missing = "decode" if prefills else "prefill"
        return partial(NoWorkers, f"no {missing} worker serves model {model} now", role=missing, model=model)
    prefill, decode = prefills[0], decodes[0]
    differing = incompatible_field(prefill.capabilities, decode.capabilities)
    assert differing is not None, "a compatible pair exists"
    here, there = (getattr(worker.capabilities, differing) for worker in (prefill, decode))
    return partial(
        IncompatibleWorkers,
        f"no prefill worker is compatible with a decode worker: {differing} is {here} on {prefill.worker_id} and "
        f"{there} on {decode.worker_id}",
        field=differing,
        prefill=prefill.worker_id,
        decode=decode.worker_id,
    )
