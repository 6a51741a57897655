"""OpenAiService on the wire: bodies in, bodies out, nothing else.

Errors become statuses in tandem.rpc.interceptors, with the parameter's name as the client wrote it; the edge turns them
into OpenAI's shape.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import openai_service_pb2 as pb
from tandem.api.frontend.v1 import openai_service_pb2_grpc as pb_grpc
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest, NotSupported
from tandem.output_parsers import Parsers
from tandem_frontend.call_context import caller_of
from tandem_frontend.openai import response
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.completions import Completions
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.request_body import parse
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest
from tandem_frontend.openai.translation import parameter
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel, get_model, list_models

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OpenAiService"].full_name


class OpenAiServicer(pb_grpc.OpenAiServiceServicer):
    """Each method is one contract of openai_service.proto."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        parsers: Parsers | None,
        open_requests_max: int,
    ) -> None:
        door, texts = EndpointHandler(generation, model, workers, open_requests_max), TokenTexts(model.tokenizer)
        self._chat = ChatCompletions(door, model, texts, parsers)
        self._completions = Completions(door, model, texts)
        self._model = model
        self._workers = workers
        self._created_time_s = int(time.time())

    async def ChatCompletions(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A chat completion, streamed or whole; a client that leaves cancels it. Bodies are pushed, not returned."""
        wanted = parse(ChatRequest, request.data)
        with _renaming(wanted):
            await self._chat.answer(wanted, len(request.data), caller_of(context, "chat"), context)

    async def Completions(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A completion, streamed or whole; a client that leaves cancels it. Bodies are pushed, not returned."""
        wanted = parse(CompletionRequest, request.data)
        with _renaming(wanted):
            await self._completions.answer(wanted, caller_of(context, "text_completion"), context)

    async def Embeddings(self, request: httpbody_pb2.HttpBody, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """No model here has them."""
        raise NotSupported("embeddings are not served: the engines here generate text")

    async def ListModels(self, request: pb.OpenAiServiceListModelsRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """The models that can be asked for now."""
        models = list_models(self._workers(), self._model)
        return response.whole({"object": "list", "data": [self._model_entry(model.name) for model in models]})

    async def GetModel(self, request: pb.OpenAiServiceGetModelRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """One of them."""
        if not request.id:
            raise InvalidRequest("model", "must be given")
        return response.whole(self._model_entry(get_model(self._workers(), self._model, unquote(request.id)).name))

    def _model_entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created_time_s, "owned_by": "tandem"}


@contextlib.contextmanager
def _renaming(wanted: ChatRequest | CompletionRequest) -> Iterator[None]:
    """A refusal in here names the parameter instead of the contract's field."""
    try:
        yield
    except InvalidRequest as problem:
        raise problem.renamed(parameter(problem.field, wanted)) from None
    except NotSupported as problem:
        if "field" in problem.metadata:
            problem.metadata["field"] = parameter(problem.metadata["field"], wanted)
        raise
