"""One entry of the list of models: what the workers of a model say, and what this frontend knows of its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1.worker_pb2 import MODEL_TASK_EMBED as EMBEDS
from tandem.api.types.v1.worker_pb2 import MODEL_TASK_GENERATE as GENERATES
from tandem.domain.worker import Worker, WorkerRole
from tandem.errors import ModelNotFound
from tandem_frontend.preparation.served_model import ServedModel


def listed_model(name: str, workers: Sequence[Worker], served: ServedModel | None) -> pb.Model:
    """A model and the live workers that serve it, at least one; `served` is None where its tokenizer is not loaded."""
    first = workers[0].capabilities
    model = pb.Model(
        name=name,
        context_tokens_max=first.context_tokens_max,
        model_digest=first.model_digest,
        tokenizer_digest=first.tokenizer_digest,
        has_chat_template=served is not None and served.tokenizer.chat_template is not None,
        # As `routing.pools` decides where workers of one name differ.
        task=EMBEDS if all(worker.capabilities.embeds for worker in workers) else GENERATES,
    )
    if model.task == EMBEDS:
        model.embedding_size, model.has_chat_template = first.embedding_size, False
    for worker in workers:
        model.prefill_workers += worker.role is WorkerRole.PREFILL
        model.decode_workers += worker.role is WorkerRole.DECODE
        model.aggregated_workers += worker.role is WorkerRole.AGGREGATED
    return model


def listed_as(models: Sequence[pb.Model], name: str) -> pb.Model:
    """The model of that name or alias.

    Raises:
        ModelNotFound: no live worker serves it.
    """
    for model in models:
        if name == model.name or name in model.aliases:
            return model
    raise ModelNotFound(f"no live worker serves model {name!r}", model=name)
