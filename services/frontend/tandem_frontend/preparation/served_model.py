"""The model that this frontend serves, and its live workers by role.

Implements the model calls of all endpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.limits import MODEL_NAME_CHARS_MAX
from tandem.domain.worker import Worker, WorkerRole, WorkerState
from tandem.errors import InvalidRequest, ModelNotFound
from tandem_frontend.preparation.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that this frontend serves."""

    name: str
    tokenizer: Tokenizer
    sampling_defaults: dict[str, float]

    def check_name(self, name: str | None) -> None:
        """Reject a request for another model; None: the request names no model.

        Raises:
            ModelNotFound, InvalidRequest
        """
        if name is not None and name != self.name:
            check_name_length(name)
            raise ModelNotFound(f"model {name!r} not found; this frontend serves {self.name!r}", model=name)


def check_name_length(name: str) -> None:
    """Reject a name that no model can have.

    Raises:
        InvalidRequest
    """
    if len(name) > MODEL_NAME_CHARS_MAX:
        raise InvalidRequest("model", f"must be at most {MODEL_NAME_CHARS_MAX} characters long")


def list_models(workers: Iterable[Worker], served: ServedModel) -> list[pb.Model]:
    """The models of live workers that this frontend serves, ordered by name."""
    models: dict[str, pb.Model] = {}
    for worker in workers:
        c = worker.capabilities
        if c.model != served.name or worker.state is not WorkerState.SERVING:
            continue
        model = models.setdefault(
            c.model,
            pb.Model(
                name=c.model,
                context_tokens_max=c.context_tokens_max,
                model_digest=c.model_digest,
                tokenizer_digest=c.tokenizer_digest,
                has_chat_template=served.tokenizer.chat_template is not None,
            ),
        )
        model.prefill_workers += worker.role is WorkerRole.PREFILL
        model.decode_workers += worker.role is WorkerRole.DECODE
        model.aggregated_workers += worker.role is WorkerRole.AGGREGATED
    return [models[name] for name in sorted(models)]


def get_model(workers: Iterable[Worker], served: ServedModel, name: str) -> pb.Model:
    """One model.

    Raises:
        ModelNotFound: no live worker serves it.
    """
    for model in list_models(workers, served):
        if model.name == name:
            return model
    raise ModelNotFound(f"no live worker serves model {name!r}", model=name)
