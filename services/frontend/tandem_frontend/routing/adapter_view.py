"""A model's workers as the routes of one adapter see them: those that serve it, under the weights that it gives them.

Pure. Two workers pair for an adapter only where they have the same weights of it, and a stream that began under one set
of weights continues under no other: the model's digest stands for both here, made of the model's and the adapter's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tandem.domain.adapter import Adapter, named
from tandem.domain.worker import LEG_CONTRACT, Start, Worker, WorkerRole, WorkerState
from tandem.errors import IncompatibleWorkers, ServiceError
from tandem_frontend.routing.candidates import why_none


class AdapterView:
    """The workers of one adapter."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: tuple[Worker, ...] = ()
        """Those that serve it; the same object until one of them changes."""
        self._all: tuple[Worker, ...] = ()
        self._known: dict[Start, tuple[Worker, Worker]] = {}
        """Each worker of the view, and the same as the routes see it."""

    @property
    def adapter(self) -> Adapter | None:
        """The adapter with the weights that most of its workers have; None: it has no worker."""
        found = Counter(adapter for worker in self.workers if (adapter := named(worker.adapters, self.name)))
        return found.most_common(1)[0][0] if found else None

    def follow(self, workers: tuple[Worker, ...]) -> bool:
        """Apply a new view of the model's workers. Returns whether those of the adapter differ."""
        self._all = workers
        mine = [worker for worker in workers if named(worker.adapters, self.name) is not None]
        self._known = {worker.start: (worker, self._seen(worker)) for worker in mine}
        former, self.workers = self.workers, tuple(seen for _, seen in self._known.values())
        if self.workers == former:
            self.workers = former
            return False
        return True

    def _seen(self, worker: Worker) -> Worker:
        """The worker as the routes see it: the same object while that is unchanged, by which the pools recognise it."""
        known, now = self._known.get(worker.start), _adapted(worker, self.name)
        return known[1] if known is not None and known[1] == now else now

    def why_none(self, workers: Sequence[Worker], model: str, tokenizer_digest: str) -> Callable[[], ServiceError]:
        """As `candidates.why_none`; it says so where the adapter is on one side of the pairs only."""
        serving = [worker for worker in self._all if worker.state is WorkerState.SERVING]
        has = {worker.start for worker in workers}
        with_it = [worker for worker in serving if worker.start in has and worker.role is not WorkerRole.AGGREGATED]
        without = [worker for worker in serving if worker.start not in has]
        roles = {worker.role for worker in with_it}
        lacking = next((worker for worker in without if worker.role in _PAIR - roles), None)
        if roles and lacking is not None:
            return partial(
                IncompatibleWorkers,
                f"adapter {self.name} is served by {with_it[0].worker_id}, but by no {lacking.role.value} worker: "
                f"load it on the whole fleet",
                field="adapter",
                **{with_it[0].role.value: with_it[0].worker_id, lacking.role.value: lacking.worker_id},
            )
        return self._unequal(workers) or why_none(workers, model, tokenizer_digest)

    def _unequal(self, workers: Sequence[Worker]) -> Callable[[], ServiceError] | None:
        """The error where no prefill worker has the weights of a decode worker."""
        usable = [one for one in workers if one.state is WorkerState.SERVING and one.leg_contract == LEG_CONTRACT]
        prefills = [worker for worker in usable if worker.role is WorkerRole.PREFILL]
        decodes = [worker for worker in usable if worker.role is WorkerRole.DECODE]
        if not prefills or not decodes:
            return None
        digests = {named(worker.adapters, self.name) for worker in prefills}
        if any(named(worker.adapters, self.name) in digests for worker in decodes):
            return None
        return partial(
            IncompatibleWorkers,
            f"adapter {self.name} has other weights on {prefills[0].worker_id} than on {decodes[0].worker_id}",
            field="adapter",
            prefill=prefills[0].worker_id,
            decode=decodes[0].worker_id,
        )


_PAIR = {WorkerRole.PREFILL, WorkerRole.DECODE}


def without_adapters(worker: Worker) -> Worker:
    """The worker as the routes of its model see it: adapters that come and go change nothing there."""
    return replace(worker, adapters=()) if worker.adapters else worker


def _adapted(worker: Worker, name: str) -> Worker:
    adapter = named(worker.adapters, name)
    assert adapter is not None, "only workers that serve the adapter are asked for"
    capabilities = worker.capabilities
    digest = hashlib.sha256(f"{capabilities.model_digest}\0{adapter.digest}".encode()).hexdigest()
    return replace(worker, capabilities=replace(capabilities, model_digest=digest), adapters=(adapter,))
