"""Adapters on a whole fleet on behalf of callers: on all serving workers of a model, or on none.

A load has two steps: every worker loads, then every worker serves. No frontend knows of the adapter before all workers
have it with equal weights. An unload has them in the reverse order. Holds nothing that must survive: a worker that
registers later, or restarts, has the adapters of its settings, and the load may be repeated for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from tandem.api.registry.v1 import registry_service_pb2 as pb
from tandem.client.adapter_calls import AdapterCalls, Loaded
from tandem.domain.adapter import NAME_RULE, is_name, named
from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.worker import Worker, WorkerState
from tandem.errors import AdapterRefused, InvalidRequest, ModelNotFound, NotSupported, TandemError
from tandem.rpc.channels import Channels
from tandem.rpc.convert import adapter_to_proto
from tandem_registry.backends.port import Backend
from tandem_registry.view_messages import duration

log = logging.getLogger(__name__)

NAMED_MAX = 32
"""Workers whose states an error lists."""


@dataclass(slots=True)
class _AtWorker:
    """What a step did at one worker."""

    worker: Worker
    took_s: float
    loaded: Loaded | None = None
    problem: TandemError | None = None


class AdapterChanges:
    """Loads and unloads adapters, one change at a time."""

    def __init__(self, backend: Backend, channels: Channels) -> None:
        self._backend = backend
        self._calls = AdapterCalls(channels)
        self._lock = asyncio.Lock()

    async def load(self, request: pb.LoadAdapterRequest) -> pb.LoadAdapterResponse:
        """Load and serve an adapter on all serving workers of a model. Goes on when the caller leaves.

        Raises:
            InvalidRequest: a field is wrong, or the name belongs to a model or to an adapter of another one.
            ModelNotFound: no serving worker has the model.
            AdapterRefused: the model computes embeddings; or a worker refused, has other weights, or cannot be
                reached, and the others are as before.
        """
        _check_name(request.name)
        if request.HasField("model") and not 1 <= len(request.model) <= MODEL_NAME_CHARS_MAX:
            raise InvalidRequest("model", f"must be 1 to {MODEL_NAME_CHARS_MAX} characters long")
        return await asyncio.shield(asyncio.create_task(self._load(request), name="load-adapter"))

    async def unload(self, request: pb.UnloadAdapterRequest) -> pb.UnloadAdapterResponse:
        """Unload an adapter on all workers that serve it. Goes on when the caller leaves.

        Raises:
            InvalidRequest: the name is none.
            ModelNotFound: no worker serves it.
            AdapterRefused: a worker cannot be reached, and all serve it as before; or one did not release its memory.
        """
        _check_name(request.name)
        return await asyncio.shield(asyncio.create_task(self._unload(request.name), name="unload-adapter"))

    async def _load(self, request: pb.LoadAdapterRequest) -> pb.LoadAdapterResponse:
        name = request.name
        async with self._lock:
            workers = self._of_model(await self._serving(), request)
            model = workers[0].capabilities.model
            loads = await _at_all(workers, lambda worker: self._calls.load(worker, name, request.path))
            problem = _first_problem(loads) or _unequal(loads)
            if problem is None:
                problem = _first_problem(await self._serve(workers, name, serve=True))
            if problem is not None:
                refused = await self._rolled_back(name, loads, problem)
                # A wrong field is the caller's, and the same at every worker.
                raise problem if isinstance(problem, InvalidRequest) else refused
        log.info("adapter %s of model %s is served by %d workers", name, model, len(workers))
        adapter = next(each.loaded.adapter for each in loads if each.loaded is not None)
        return pb.LoadAdapterResponse(
            adapter=adapter_to_proto(adapter), model=model, workers=[_loaded_message(each) for each in loads]
        )

    async def _unload(self, name: str) -> pb.UnloadAdapterResponse:
        async with self._lock:
            workers = [worker for worker in await self._all() if named(worker.adapters, name) is not None]
            if not workers:
                raise ModelNotFound(f"no worker serves adapter {name!r}", model=name)
            stops = await self._serve(workers, name, serve=False)
            problem = _first_problem(stops)
            if problem is not None:
                await self._serve([each.worker for each in stops if each.problem is None], name, serve=True)
                states = {each.worker.worker_id: "SERVED" if each.problem is None else "REFUSED" for each in stops}
                raise _refused(name, problem, f"adapter {name} is not unloaded", states)
        # Without the lock: open requests of the adapter may take minutes to end, and other changes need not wait.
        releases = await _at_all(workers, lambda worker: self._calls.unload(worker, name))
        problem = _first_problem(releases)
        if problem is not None:
            states = {each.worker.worker_id: "UNLOADED" if each.problem is None else "HELD" for each in releases}
            raise _refused(name, problem, f"adapter {name} is not served any more, but a worker holds it", states)
        log.info("adapter %s is unloaded from %d workers", name, len(workers))
        outcome = pb.ADAPTER_OUTCOME_UNLOADED
        return pb.UnloadAdapterResponse(workers=[_message(each, outcome) for each in releases])

    async def _serve(self, workers: Sequence[Worker], name: str, *, serve: bool) -> list[_AtWorker]:
        return await _at_all(workers, lambda worker: self._calls.serve(worker, name, serve=serve))

    async def _rolled_back(self, name: str, loads: Sequence[_AtWorker], problem: TandemError) -> AdapterRefused:
        """Bring each worker back to its former state. Returns the error of the load."""
        loaded = {each.worker: each.loaded for each in loads if each.loaded is not None}
        new = [worker for worker, result in loaded.items() if not result.was_loaded]
        held = [worker for worker, result in loaded.items() if result.was_loaded and not result.is_served]
        undone = await _at_all(new, lambda worker: self._calls.unload(worker, name))
        await self._serve(held, name, serve=False)
        states = {
            each.worker.worker_id: "PRESENT" if each.loaded is not None else "REFUSED"
            for each in sorted(loads, key=lambda each: each.worker.worker_id)
        }
        states |= {each.worker.worker_id: "ROLLED_BACK" if each.problem is None else "UNKNOWN" for each in undone}
        if (worker_id := problem.metadata.get("worker")) in states:
            states[worker_id] = "REFUSED" if states[worker_id] != "ROLLED_BACK" else "REFUSED_AND_ROLLED_BACK"
        return _refused(name, problem, f"adapter {name} is not loaded on any further worker", states)

    async def _all(self) -> list[Worker]:
        if not self._backend.origin.is_live:
            raise AdapterRefused("this registry has only the last known view; some workers in it may be gone")
        return [listed.member for listed in (await self._backend.view()).workers]

    async def _serving(self) -> list[Worker]:
        return [worker for worker in await self._all() if worker.state is WorkerState.SERVING]

    def _of_model(self, serving: Sequence[Worker], request: pb.LoadAdapterRequest) -> list[Worker]:
        """The workers of the model of a request."""
        models = sorted({worker.capabilities.model for worker in serving})
        if not request.HasField("model") and len(models) > 1:
            raise InvalidRequest("model", f"must be given: serving workers have {', '.join(models)}")
        model = request.model if request.HasField("model") else next(iter(models), "")
        if model not in models:
            raise ModelNotFound(f"no serving worker has model {model!r}", model=model)
        if request.name in models:
            raise InvalidRequest("name", f"{request.name} is the name of a model")
        for worker in serving:
            if worker.capabilities.model != model and named(worker.adapters, request.name) is not None:
                raise InvalidRequest("name", f"{request.name} is an adapter of model {worker.capabilities.model}")
        workers = [worker for worker in serving if worker.capabilities.model == model]
        embedding = next((worker for worker in workers if worker.capabilities.embeds), None)
        if embedding is not None:
            task = embedding.capabilities.task
            raise AdapterRefused(
                f"model {model} has task {task}: its vectors would not be the adapter's", adapter=request.name
            )
        return workers


async def _at_all(workers: Sequence[Worker], call: Callable[[Worker], Awaitable[Loaded | None]]) -> list[_AtWorker]:
    async def at(worker: Worker) -> _AtWorker:
        begin_s = time.monotonic()
        try:
            loaded = await call(worker)
        except NotSupported as problem:
            return _AtWorker(worker, time.monotonic() - begin_s, problem=_located(problem, worker, "has no adapters"))
        except TandemError as problem:
            return _AtWorker(worker, time.monotonic() - begin_s, problem=_located(problem, worker, "failed"))
        return _AtWorker(worker, time.monotonic() - begin_s, loaded)

    return list(await asyncio.gather(*map(at, workers)))


def _located(problem: TandemError, worker: Worker, what: str) -> TandemError:
    """The problem with its worker, in its text too."""
    if isinstance(problem, InvalidRequest):
        problem.metadata["worker"] = worker.worker_id
        return problem
    text = str(problem) if worker.worker_id in str(problem) else f"worker {worker.worker_id} {what}: {problem}"
    return AdapterRefused(text, worker=worker.worker_id)


def _first_problem(results: Sequence[_AtWorker]) -> TandemError | None:
    return next((each.problem for each in results if each.problem is not None), None)


def _unequal(loads: Sequence[_AtWorker]) -> TandemError | None:
    """The error where workers found different weights under the path."""
    digests = {each.worker.worker_id: each.loaded.adapter.digest for each in loads if each.loaded is not None}
    common = Counter(digests.values()).most_common(1)[0][0]
    odd = next((worker_id for worker_id, digest in digests.items() if digest != common), None)
    if odd is None:
        return None
    return AdapterRefused(f"worker {odd} has other weights of the adapter than the other workers", worker=odd)


def _refused(name: str, problem: TandemError, what: str, states: Mapping[str, str]) -> AdapterRefused:
    more = f",{len(states) - NAMED_MAX} more" if len(states) > NAMED_MAX else ""
    listed = ",".join(f"{worker_id}={state}" for worker_id, state in [*states.items()][:NAMED_MAX]) + more
    return AdapterRefused(f"{what}: {problem}", adapter=name, worker=problem.metadata.get("worker"), workers=listed)


def _loaded_message(each: _AtWorker) -> pb.AdapterAtWorker:
    was_loaded = each.loaded is not None and each.loaded.was_loaded
    return _message(each, pb.ADAPTER_OUTCOME_PRESENT if was_loaded else pb.ADAPTER_OUTCOME_LOADED)


def _message(each: _AtWorker, outcome: pb.AdapterOutcome.ValueType) -> pb.AdapterAtWorker:
    return pb.AdapterAtWorker(worker_id=each.worker.worker_id, outcome=outcome, duration=duration(each.took_s))


def _check_name(name: str) -> None:
    if not is_name(name):
        raise InvalidRequest("name", NAME_RULE)
