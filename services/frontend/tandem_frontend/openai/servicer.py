"""OpenAiService: HTTP bodies in, HTTP bodies out.

tandem.rpc.handler_guard turns errors into gRPC statuses that name the parameter as the client wrote it; the edge turns
them into OpenAI's error object.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from urllib.parse import unquote

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import openai_service_pb2 as pb
from tandem.api.frontend.v1 import openai_service_pb2_grpc as pb_grpc
from tandem.api.frontend.v1.inference_service_pb2 import Model
from tandem.domain.worker import Worker
from tandem.errors import InvalidRequest, NotSupported
from tandem.output_parsers import Parsers
from tandem_frontend.call_context import SESSION_HEADER, Caller, caller_of
from tandem_frontend.openai import response
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.completions import Completions
from tandem_frontend.openai.field_names import renaming
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.responses_api.handler import Responses
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest
from tandem_frontend.openai.translation import parameter
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel, get_model, list_models
from tandem_frontend.response.writers import ClientCall

CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH = "/v1/chat/completions", "/v1/completions", "/v1/responses"
OPERATIONS = {CHAT_PATH: "chat", COMPLETIONS_PATH: "text_completion", RESPONSES_PATH: "chat"}
"""The calls that generate, by their HTTP path, with their names in traces and metrics."""
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OpenAiService"].full_name


class OpenAiServicer(pb_grpc.OpenAiServiceServicer):
    """Implements openai_service.proto."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        parsers: Parsers | None,
        bodies: BodyChecker,
        session_header: str = SESSION_HEADER,
        *,
        comment_s: float = 0,
    ) -> None:
        """`comment_s`: see the setting stream_comment_s."""
        self._caller_of = partial(caller_of, session_header=session_header)
        handler, texts = EndpointHandler(generation, model, workers, comment_s=comment_s), TokenTexts(model.tokenizer)
        self._chat = ChatCompletions(handler, model, texts, parsers)
        self._completions = Completions(handler, model, texts)
        self._responses = Responses(handler, model, texts, self._chat)
        self._bodies = bodies
        self._model = model
        self._workers = workers
        self._created_time_s = int(time.time())

    async def ChatCompletions(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A chat completion, streamed or not; a client that disconnects cancels it. Bodies are pushed, not returned."""
        await self.answer(CHAT_PATH, request.data, self._caller_of(context, OPERATIONS[CHAT_PATH]), context)

    async def Completions(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A completion, streamed or not; a client that disconnects cancels it. Bodies are pushed, not returned."""
        await self.answer(
            COMPLETIONS_PATH, request.data, self._caller_of(context, OPERATIONS[COMPLETIONS_PATH]), context
        )

    async def Responses(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A response, streamed or not; a client that disconnects cancels it. Bodies are pushed, not returned."""
        await self.answer(RESPONSES_PATH, request.data, self._caller_of(context, OPERATIONS[RESPONSES_PATH]), context)

    async def answer(self, path: str, data: bytes, caller: Caller, call: ClientCall) -> None:
        """Run the request in a body, of one of the paths in `OPERATIONS`, and send its response into `call`.

        Raises:
            TandemError: its `field` is the client's parameter.
        """
        if path == RESPONSES_PATH:
            responses = await self._bodies.parse(ResponsesRequest, data, caller.fairness_id)
            await self._responses.handle(responses, len(data), caller, call)
        elif path == COMPLETIONS_PATH:
            body = await self._bodies.parse(CompletionRequest, data, caller.fairness_id)
            with _parameter_names(body):
                await self._completions.handle(body, caller, call)
        else:
            chat = await self._bodies.parse(ChatRequest, data, caller.fairness_id)
            with _parameter_names(chat):
                await self._chat.handle(chat, len(data), caller, call)

    async def Embeddings(self, request: httpbody_pb2.HttpBody, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """Not supported: the workers only generate text."""
        raise NotSupported("embeddings are not supported: the workers only generate text")

    async def ListModels(self, request: pb.OpenAiServiceListModelsRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """The models that live workers serve."""
        models = list_models(self._workers(), self._model)
        return response.whole({"object": "list", "data": [self._model_entry(model) for model in models]})

    async def GetModel(self, request: pb.OpenAiServiceGetModelRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """One model that live workers serve."""
        if not request.id:
            raise InvalidRequest("model", "must be given")
        # SDKs percent-encode names like "org/model", and the transcoder does not decode a path of several segments.
        return response.whole(self._model_entry(get_model(self._workers(), self._model, unquote(request.id))))

    def _model_entry(self, model: Model) -> dict[str, Any]:
        entry = {"id": model.name, "object": "model", "created": self._created_time_s, "owned_by": "tandem"}
        # Agents size their context by it; some clients know the one name, some the other.
        return {**entry, "max_model_len": model.context_tokens_max, "context_length": model.context_tokens_max}


def _parameter_names(body: ChatRequest | CompletionRequest) -> AbstractContextManager[None]:
    """Rename the field of an error from the contract's name to the OpenAI parameter."""
    return renaming(lambda field: parameter(field, body))
