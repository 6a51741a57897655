"""The pipelines of a model's adapters: each is the model's own one, with the adapter's name, routes and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import WorkerState
from tandem_frontend.adapter_fleets import AdapterFleet, AdapterFleets
from tandem_frontend.models.listing import listed_model
from tandem_frontend.models.model_pipeline import ModelPipeline


class AdapterPipelines:
    """The adapters of one model that is served."""

    def __init__(self, base: ModelPipeline, fleets: AdapterFleets) -> None:
        self._base = base
        self._fleets = fleets
        self._pipelines: dict[str, tuple[AdapterFleet, ModelPipeline]] = {}

    def find(self, name: str) -> ModelPipeline | None:
        """The pipeline of an adapter; the same object while it is served. None: no worker serves it."""
        fleet = self._fleets.find(name)
        if fleet is None:
            self._pipelines.pop(name, None)
            return None
        known = self._pipelines.get(name)
        if known is None or known[0] is not fleet:
            known = self._pipelines[name] = fleet, self._made(name, fleet)
        return known[1]

    def names(self) -> list[str]:
        """Names of the adapters that any worker serves, in order."""
        return [fleet.view.name for fleet in self._fleets.served]

    def listed(self) -> Sequence[pb.Model]:
        """An entry for each, ordered by name; one without a route says why."""
        return [self._listed(fleet) for fleet in self._fleets.served]

    def _made(self, name: str, fleet: AdapterFleet) -> ModelPipeline:
        model = replace(self._base.model, name=name, parent=self._base.model.name)
        generation = self._base.generation.with_routes(model, fleet.execution)
        return replace(
            self._base, model=model, generation=generation, workers=lambda: fleet.view.workers, embeddings=None
        )

    def _listed(self, fleet: AdapterFleet) -> pb.Model:
        view, routes = fleet.view, fleet.execution.routes
        workers = [worker for worker in view.workers if worker.state is WorkerState.SERVING]
        model = listed_model(view.name, workers or view.workers, self._base.model)
        model.parent = self._base.model.name
        model.state = pb.MODEL_STATE_SERVING
        if (adapter := view.adapter) is not None:
            model.adapter_digest = adapter.digest
        if (problem := routes.problem()) is not None:
            model.state, model.problem = pb.MODEL_STATE_REFUSED, str(problem)
        return model
