"""AnthropicService: HTTP bodies in, HTTP bodies out.

tandem.rpc.handler_guard turns errors into gRPC statuses that name the parameter as the client wrote it; the edge turns
them into Anthropic's error object.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import anthropic_service_pb2 as pb
from tandem.api.frontend.v1 import anthropic_service_pb2_grpc as pb_grpc
from tandem_frontend.anthropic.handler import Messages as Endpoints
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest
from tandem_frontend.call_context import SESSION_HEADER, caller_of
from tandem_frontend.models.model_pipeline import ModelPipeline, Models
from tandem_frontend.openai import response
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AnthropicService"].full_name


class AnthropicServicer(pb_grpc.AnthropicServiceServicer):
    """Implements anthropic_service.proto."""

    def __init__(
        self, models: Models, bodies: BodyChecker, session_header: str = SESSION_HEADER, *, comment_s: float = 0
    ) -> None:
        """`comment_s`: see the setting stream_comment_s."""
        self._models = models
        self._caller_of = partial(caller_of, session_header=session_header)
        self._bodies = bodies
        self._comment_s = comment_s
        self._messages: WeakKeyDictionary[ModelPipeline, Endpoints] = WeakKeyDictionary()

    async def Messages(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A message, streamed or not; a client that disconnects cancels it. Bodies are pushed, not returned."""
        caller = self._caller_of(context, "chat")
        body = await self._bodies.parse(MessagesRequest, request.data, caller.fairness_id)
        await (await self._of(body.model)).handle(body, len(request.data), caller, context)

    async def CountTokens(self, request: httpbody_pb2.HttpBody, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """The length of a prompt; nothing is generated."""
        caller = self._caller_of(context, "chat")
        self._models.charge(caller)
        body = await self._bodies.parse(CountTokensRequest, request.data, caller.fairness_id)
        messages = await self._of(body.model)
        return response.whole(await messages.count(body, len(request.data)))

    async def _of(self, name: str | None) -> Endpoints:
        """The endpoints of the model that a request names."""
        found = await self._models.find(name)
        messages = self._messages.get(found)
        if messages is None:
            handler = EndpointHandler(found.generation, found.model, found.workers, comment_s=self._comment_s)
            texts = TokenTexts(found.model.tokenizer)
            chat = ChatCompletions(handler, found.model, texts, found.parsers)
            messages = self._messages[found] = Endpoints(handler, found.model, texts, chat)
        return messages
