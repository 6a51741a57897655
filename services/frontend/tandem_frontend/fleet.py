"""The workers of all models as this frontend sees them: one view, and one connection to each worker.

Owns the connections to workers, and the order in which a new view reaches them and the parts of each model
(`model_fleet`). `app` opens it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from tandem.client.load_watch import LoadWatch
from tandem.client.step_calls import WorkerCalls
from tandem.discovery import WorkerWatch
from tandem.domain.worker import EngineLoad, Start, Worker
from tandem.rpc.channels import Channels
from tandem.service.awake_timers import AwakeTimers
from tandem_frontend.config import FrontendConfig
from tandem_frontend.execution.link_leg import Bounds
from tandem_frontend.execution.worker_links import WorkerLinks
from tandem_frontend.model_fleet import ModelFleet, WorkerAccess
from tandem_frontend.routing.worker_health import WorkerHealth


class Fleet:
    """The workers that the registry lists: their view, health, load and links, and the models that they serve."""

    def __init__(self, config: FrontendConfig, instance: str) -> None:
        """Makes no connection yet.

        Args:
            config: registries, TLS and timeouts of legs.
            instance: unique name of this process, for workers.
        """
        self._prefix_blocks_max = config.prefix_blocks_max
        self._models: dict[str, ModelFleet] = {}
        self._model_of: dict[Start, ModelFleet] = {}
        """The model of each worker in the view; without those of models that are not served."""
        self._known_starts: set[tuple[str, Start]] = set()
        """(address, start) of all workers of the view."""
        self.on_view: Callable[[tuple[Worker, ...]], None] = lambda workers: None
        """Called with each view, after the models have it."""
        self.channels = Channels(config.tls)
        self._timers = AwakeTimers()
        self._health = WorkerHealth(self.channels, self._timers)
        self.loads = LoadWatch(self.channels, on_change=self.note_load)
        bounds = Bounds(config.leg_accept_timeout_s, config.leg_silence_timeout_s)
        self._links = WorkerLinks(instance, WorkerCalls(self.channels), bounds, self._timers, self._health.check)
        self.access = WorkerAccess(self.channels, self._health, self._links)
        self.watch = WorkerWatch(config.registry, tls=config.tls, on_change=self.follow)

    @property
    def models(self) -> Sequence[ModelFleet]:
        """The models whose workers are followed."""
        return [*self._models.values()]

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Follow the registry's view and watch its workers; close every connection on exit."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.channels.close)
            stack.push_async_callback(self._health.close)
            await self._health.start()
            stack.callback(self._timers.close)
            stack.push_async_callback(self._links.close)
            stack.push_async_callback(self.loads.close)
            stack.push_async_callback(self.watch.close)
            await self.watch.start()
            yield

    def unhealthy(self) -> frozenset[Start]:
        """Workers that do not respond to this frontend, or report NOT_SERVING."""
        return self._health.unhealthy()

    def ejected(self) -> frozenset[Start]:
        """Workers whose circuit breakers keep requests away from them."""
        return frozenset[Start]().union(*(model.ejected() for model in self._models.values()))

    @asynccontextmanager
    async def following(self, model: ModelFleet) -> AsyncIterator[None]:
        """Follow the workers of one more model while the context is entered."""
        assert model.name not in self._models, "a model is followed once"
        self._models[model.name] = model
        self._share_blocks()
        self._pass_on(self.watch.workers(), (model,))
        try:
            yield
        finally:
            del self._models[model.name]
            self._model_of = {start: other for start, other in self._model_of.items() if other is not model}
            await model.close()
            self._share_blocks()

    def follow(self, workers: tuple[Worker, ...]) -> None:
        """Pass a new view on to every part, and close the channels to workers that were removed or restarted.

        A restarted worker at the same address gets a new channel: the old one may be in its reconnect back-off.
        """
        starts = {(worker.address, worker.start) for worker in workers}
        self.channels.keep_only({address for address, _ in starts & self._known_starts})
        self._known_starts = starts
        self._links.follow(workers)
        self._health.follow(workers)
        self._pass_on(workers, self.models)
        self.on_view(workers)

    def note_load(self, start: Start, load: EngineLoad | None) -> None:
        """Pass on the load of a worker to its model; None: it is unknown."""
        model = self._model_of.get(start)
        # The loads of a worker that has left end after its model has forgotten it.
        for each in self.models if model is None and load is None else (() if model is None else (model,)):
            each.note_load(start, load)

    def _pass_on(self, workers: tuple[Worker, ...], models: Sequence[ModelFleet]) -> None:
        """Give each of these models its workers of a view, and act on what has changed."""
        by_model: dict[str, list[Worker]] = {}
        for worker in workers:
            by_model.setdefault(worker.capabilities.model, []).append(worker)
        self._model_of = {
            worker.start: model for name, model in self._models.items() for worker in by_model.get(name, ())
        }
        changed = [model for model in models if model.follow(tuple(by_model.get(model.name, ())))]
        self.loads.follow([worker for worker in workers if worker.start in self._model_of])
        for model in changed:
            model.act()

    def _share_blocks(self) -> None:
        """Divide the room for cached blocks evenly: one model's caches push no other's out."""
        for model in self._models.values():
            if model.prefixes is not None:
                model.prefixes.blocks_max = max(1, self._prefix_blocks_max // len(self._models))
