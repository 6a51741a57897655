"""What serves one model, as the servicers see it. They find it by the name in a request, once for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Worker
from tandem.errors import NotSupported
from tandem.output_parsers import Parsers
from tandem_frontend.call_context import Caller
from tandem_frontend.embedding import Embeddings
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ModelPipeline:
    """The pipeline of one model, and what its endpoints need beside it."""

    model: ServedModel
    generation: Generation
    workers: Callable[[], tuple[Worker, ...]]
    """Its workers in the registry's view; the same object until one of them changes."""
    parsers: Parsers | None = None
    """None: neither its tool calls nor its reasoning are parsed."""
    embeddings: Embeddings | None = None
    """None: of an adapter, whose base's vectors are not its own; and in tests of other endpoints."""

    def embedding(self) -> Embeddings:
        """Its embeddings.

        Raises:
            NotSupported: it is an adapter.
        """
        if self.embeddings is None:
            raise NotSupported(f"{self.model.name} is an adapter, and adapters compute no embeddings", field="model")
        return self.embeddings


class Models(Protocol):
    """The models that a frontend serves now."""

    async def find(self, name: str | None) -> ModelPipeline:
        """The model of that name or alias; None: the request names none. Waits while it is being loaded.

        Raises:
            ModelNotFound: no model that is served has the name.
            InvalidRequest: no model can have the name, or none is named where several are served.
            NoWorkers: none is named, and none is served; or it is still being loaded.
        """
        ...

    def listed(self) -> Sequence[pb.Model]:
        """The models of live workers, refused ones too, ordered by name."""
        ...

    def charge(self, caller: Caller) -> None:
        """Charge a call that generates nothing: it counts in the caller's rate, not in a quota.

        Raises:
            Draining, Overloaded: it would not be admitted.
        """
        ...


class OneModel:
    """A single model that is always there, whatever its name: for tests and benchmarks of endpoints."""

    def __init__(self, pipeline: ModelPipeline) -> None:
        self._pipeline = pipeline

    async def find(self, name: str | None) -> ModelPipeline:
        """See `Models`."""
        return self._pipeline

    def listed(self) -> Sequence[pb.Model]:
        """See `Models`."""
        return []

    def charge(self, caller: Caller) -> None:
        """Never refuses."""
