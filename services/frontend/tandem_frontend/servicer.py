"""InferenceService on the wire: translates protobuf to the pipeline's stages and back, nothing else.

`tandem.rpc.handler_guard` turns errors into statuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import unquote

from google.api.httpbody_pb2 import HttpBody

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1 import inference_service_pb2_grpc as pb_grpc
from tandem.errors import InvalidRequest
from tandem.rpc.convert import present
from tandem_frontend.call_context import SESSION_HEADER, Caller, caller_of
from tandem_frontend.embedding import OPERATION as EMBEDDINGS
from tandem_frontend.models.listing import listed_as
from tandem_frontend.models.model_pipeline import Models
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import check_name_length
from tandem_frontend.preparation.validation import checked_detokenize, checked_tokenize
from tandem_frontend.response.sse import failure_event
from tandem_frontend.response.writers import ChunkWriter, SseWriter, UnaryWriter

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """The contract of inference_service.proto."""

    def __init__(self, models: Models, session_header: str = SESSION_HEADER) -> None:
        self._caller_of = partial(caller_of, session_header=session_header)
        self._models = models

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Stream a generation; it is cancelled when the client cancels. Messages are pushed, not returned."""
        generation = await self._generation_of(request)
        with self._charged(generation, context) as caller:
            await generation.generate(request, caller, ChunkWriter(context))

    async def GenerateEvents(self, request: pb.GenerateEventsRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """The same as server-sent events, for HTTP. A failure after the first event is sent as the last event."""
        response = SseWriter(context)
        try:
            generation = await self._generation_of(request.generate)
            with self._charged(generation, context) as caller:
                await generation.generate(request.generate, caller, response)
        except Exception as problem:  # also a defect must end the stream with an event
            if not response.has_begun:
                raise
            context.send(HttpBody(data=failure_event(problem)))

    async def GenerateUnary(self, request: pb.GenerateUnaryRequest, context: Any) -> pb.GenerateUnaryResponse:  # noqa: N802
        """The same in one message."""
        response = UnaryWriter()
        generation = await self._generation_of(request.generate)
        with self._charged(generation, context) as caller:
            await generation.generate(request.generate, caller, response)
        return response.response

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """Embeddings of all inputs; cancelled when the client cancels."""
        found = await self._models.find(present(request, "model", request.model))
        return await found.embedding().embed(request, self._caller_of(context, EMBEDDINGS), context)

    @contextlib.contextmanager
    def _charged(self, generation: Generation, context: Any) -> Iterator[Caller]:
        """The caller of a call that generates once; raises where that is refused."""
        caller = self._caller_of(context)
        with generation.charged(caller, context):
            yield caller

    async def _generation_of(self, request: pb.GenerateRequest) -> Generation:
        return (await self._models.find(present(request, "model", request.model))).generation

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Text or messages to token ids."""
        found = await self._models.find(present(request, "model", request.model))
        return pb.TokenizeResponse(token_ids=await checked_tokenize(request, found.model.tokenizer))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        """Token ids to text."""
        tokenizer = (await self._models.find(present(request, "model", request.model))).model.tokenizer
        token_ids = checked_detokenize(request, tokenizer)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await tokenizer.decode_all(token_ids, skip_special_tokens=skip))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """The models that are served now."""
        return pb.ListModelsResponse(models=self._models.listed())

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """One of them."""
        if not request.model:
            raise InvalidRequest("model", "must be given")
        check_name_length(request.model)
        return pb.GetModelResponse(model=listed_as(self._models.listed(), unquote(request.model)))
