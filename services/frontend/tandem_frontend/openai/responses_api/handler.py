"""POST /v1/responses: items to items, on the generation of a chat completion. Keeps nothing of a response."""

from __future__ import annotations

import contextlib

from tandem_frontend.call_context import Caller
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.field_names import renaming
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.responses_api.output import ResponseOutput, response_head
from tandem_frontend.openai.responses_api.schemas import ResponsesRequest
from tandem_frontend.openai.responses_api.translation import Translated
from tandem_frontend.openai.typed_events import respond
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.response.writers import ClientCall


class Responses:
    """Handles POST /v1/responses."""

    def __init__(self, handler: EndpointHandler, model: ServedModel, texts: TokenTexts, chat: ChatCompletions) -> None:
        self._handler = handler
        self._model = model
        self._texts = texts
        self._chat = chat

    async def handle(self, body: ResponsesRequest, body_bytes: int, caller: Caller, call: ClientCall) -> None:
        """Run the request and send its response into `call`. `body_bytes` is the length of the request body.

        Raises:
            TandemError: its `field` is a parameter of the Responses API.
        """
        translated = Translated(body)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(renaming(translated.name))
            chat = await self._chat.prepare(translated.chat, body_bytes, caller, call, stack)
            output = ResponseOutput(
                response_head(body, self._model.name, self._model.sampling_defaults),
                self._count_tokens,
                translated.names,
                chat.requests[0],
                self._texts,
                chat.parsed[0],
                one_call_only=body.parallel_tool_calls is False,
                streams=bool(body.stream),
            )
            await respond(self._handler, chat, output, caller, call, stream=bool(body.stream))

    async def _count_tokens(self, text: str) -> int:
        return len(await self._model.tokenizer.encode(text, add_special_tokens=False))
