"""AnthropicService: HTTP bodies in, HTTP bodies out.

tandem.rpc.handler_guard turns errors into gRPC statuses that name the parameter as the client wrote it; the edge turns
them into Anthropic's error object.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import anthropic_service_pb2 as pb
from tandem.api.frontend.v1 import anthropic_service_pb2_grpc as pb_grpc
from tandem.domain.worker import Worker
from tandem.output_parsers import Parsers
from tandem_frontend.anthropic.handler import Messages
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest
from tandem_frontend.call_context import SESSION_HEADER, caller_of
from tandem_frontend.openai import response
from tandem_frontend.openai.body_check.checker import BodyChecker
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["AnthropicService"].full_name


class AnthropicServicer(pb_grpc.AnthropicServiceServicer):
    """Implements anthropic_service.proto."""

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
        self._generation = generation
        self._caller_of = partial(caller_of, session_header=session_header)
        handler, texts = EndpointHandler(generation, model, workers, comment_s=comment_s), TokenTexts(model.tokenizer)
        self._messages = Messages(handler, model, texts, ChatCompletions(handler, model, texts, parsers))
        self._bodies = bodies

    async def Messages(self, request: httpbody_pb2.HttpBody, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """A message, streamed or not; a client that disconnects cancels it. Bodies are pushed, not returned."""
        caller = self._caller_of(context, "chat")
        body = await self._bodies.parse(MessagesRequest, request.data, caller.fairness_id)
        await self._messages.handle(body, len(request.data), caller, context)

    async def CountTokens(self, request: httpbody_pb2.HttpBody, context: Any) -> httpbody_pb2.HttpBody:  # noqa: N802
        """The length of a prompt; nothing is generated."""
        caller = self._caller_of(context, "chat")
        self._generation.charge(caller)
        body = await self._bodies.parse(CountTokensRequest, request.data, caller.fairness_id)
        return response.whole(await self._messages.count(body, len(request.data)))
