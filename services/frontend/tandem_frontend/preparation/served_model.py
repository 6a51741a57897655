"""The model a frontend speaks for, and what of it is alive: the registry's view, counted by role.

Serves the model calls of every door.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Worker, WorkerRole, WorkerState
from tandem.errors import InvalidRequest, ModelNotFound
from tandem_frontend.preparation.tokenizer import Tokenizer

NAME_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model this frontend speaks for."""

    name: str
    tokenizer: Tokenizer
    sampling_defaults: dict[str, float]

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model; None is a request for the only one.

        Raises:
            ModelNotFound, InvalidRequest
        """
        if name is not None and name != self.name:
            check_name_length(name)
            raise ModelNotFound(f"no model {name!r} is served here; there is {self.name!r}", model=name)


def check_name_length(name: str) -> None:
    """Refuse what can be no model's name.

    Raises:
        InvalidRequest
    """
    if len(name) > NAME_CHARS_MAX:
        raise InvalidRequest("model", f"must be at most {NAME_CHARS_MAX} characters long")


def list_models(workers: Iterable[Worker], served: ServedModel) -> list[pb.Model]:
    """The models of live workers that this frontend speaks for, ordered by name."""
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
