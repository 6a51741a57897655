"""OpenAiService: HTTP bodies in, HTTP bodies out.

tandem.rpc.handler_guard turns errors into gRPC statuses that name the parameter as the client wrote it; the edge turns
them into OpenAI's error object.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import openai_service_pb2 as pb
from tandem.api.frontend.v1 import openai_service_pb2_grpc as pb_grpc
from tandem.api.frontend.v1.inference_service_pb2 import MODEL_STATE_REFUSED, Model
from tandem.api.types.v1.worker_pb2 import MODEL_TASK_EMBED
from tandem.errors import InvalidRequest
from tandem_frontend.call_context import SESSION_HEADER, Caller, caller_of
from tandem_frontend.embedding import OPERATION
from tandem_frontend.models.listing import listed_as
from tandem_frontend.models.model_pipeline import ModelPipeline, Models
from tandem_frontend.openai import embeddings, response
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.completions import Completions
from tandem_frontend.openai.field_names import renaming
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.responses_api.handler import Responses
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.schemas import ChatRequest, CompletionRequest, EmbeddingsRequest
from tandem_frontend.openai.translation import parameter
from tandem_frontend.response.writers import ClientCall

CHAT_PATH, COMPLETIONS_PATH, RESPONSES_PATH = "/v1/chat/completions", "/v1/completions", "/v1/responses"
OPERATIONS = {CHAT_PATH: "chat", COMPLETIONS_PATH: "text_completion", RESPONSES_PATH: "chat"}
"""The calls that generate, by their HTTP path, with their names in traces and metrics."""
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OpenAiService"].full_name


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The endpoints of one model."""

    chat: ChatCompletions
    completions: Completions
    responses: Responses

    @classmethod
    def of(cls, found: ModelPipeline, comment_s: float) -> Endpoints:
        """Make them. `comment_s`: see the setting stream_comment_s."""
        handler = EndpointHandler(found.generation, found.model, found.workers, comment_s=comment_s)
        texts = TokenTexts(found.model.tokenizer)
        chat = ChatCompletions(handler, found.model, texts, found.parsers)
        completions = Completions(handler, found.model, texts)
        return cls(chat, completions, Responses(handler, found.model, texts, chat))


class OpenAiServicer(pb_grpc.OpenAiServiceServicer):
    """Implements openai_service.proto."""

    def __init__(
        self, models: Models, bodies: BodyChecker, session_header: str = SESSION_HEADER, *, comment_s: float = 0
    ) -> None:
        """`comment_s`: see the setting stream_comment_s."""
        self._caller_of = partial(caller_of, session_header=session_header)
        self._models = models
        self._bodies = bodies
        self._comment_s = comment_s
        self._endpoints: WeakKeyDictionary[ModelPipeline, Endpoints] = WeakKeyDictionary()
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
            await (await self._of(responses.model)).responses.handle(responses, len(data), caller, call)
        elif path == COMPLETIONS_PATH:
            body = await self._bodies.parse(CompletionRequest, data, caller.fairness_id)
            endpoints = await self._of(body.model)
            with _parameter_names(body):
                await endpoints.completions.handle(body, caller, call)
        else:
            chat = await self._bodies.parse(ChatRequest, data, caller.fairness_id)
            endpoints = await self._of(chat.model)
            with _parameter_names(chat):
                await endpoints.chat.handle(chat, len(data), caller, call)

    async def Embeddings(self, request: httpbody_pb2.HttpBody, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """Embeddings of one or several inputs; a client that disconnects cancels them."""
        caller = self._caller_of(context, OPERATION)
        body = await self._bodies.parse(EmbeddingsRequest, request.data, caller.fairness_id)
        found = await self._models.find(body.model)
        return await embeddings.handle(body, found.embedding(), caller, context)

    async def ListModels(self, request: pb.OpenAiServiceListModelsRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """The models that live workers serve, and their aliases."""
        entries = [
            self._entry(name, model)
            for model in self._models.listed()
            if model.state != MODEL_STATE_REFUSED
            for name in (model.name, *model.aliases)
        ]
        return response.whole({"object": "list", "data": entries})

    async def GetModel(self, request: pb.OpenAiServiceGetModelRequest, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """One model that live workers serve."""
        if not request.id:
            raise InvalidRequest("model", "must be given")
        # SDKs percent-encode names like "org/model", and the transcoder does not decode a path of several segments.
        name = unquote(request.id)
        return response.whole(self._entry(name, listed_as(self._models.listed(), name)))

    async def _of(self, name: str | None) -> Endpoints:
        """The endpoints of the model that a request names."""
        found = await self._models.find(name)
        endpoints = self._endpoints.get(found)
        if endpoints is None:
            endpoints = self._endpoints[found] = Endpoints.of(found, self._comment_s)
        return endpoints

    def _entry(self, name: str, model: Model) -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": self._created_time_s, "owned_by": "tandem"}
        if name != model.name:
            entry["root"] = model.name
        if model.parent:
            entry["parent"] = model.parent
        if model.task == MODEL_TASK_EMBED:
            entry |= {"task": "embed", "embedding_size": model.embedding_size}
        # Agents size their context by it; some clients know the one name, some the other.
        return {**entry, "max_model_len": model.context_tokens_max, "context_length": model.context_tokens_max}


def _parameter_names(body: ChatRequest | CompletionRequest) -> AbstractContextManager[None]:
    """Rename the field of an error from the contract's name to the OpenAI parameter."""
    return renaming(lambda field: parameter(field, body))
