"""POST /v1/messages and /v1/messages/count_tokens, on the generation of a chat completion."""

from __future__ import annotations

import contextlib
from typing import Any

from tandem_frontend.anthropic.output import MessageOutput
from tandem_frontend.anthropic.schemas import CountTokensRequest, MessagesRequest, PromptFields
from tandem_frontend.anthropic.translation import Translated, hides_thinking
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.chat import ChatCompletions
from tandem_frontend.openai.field_names import renaming
from tandem_frontend.openai.handler import EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts
from tandem_frontend.openai.typed_events import respond
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.response.writers import ClientCall


class Messages:
    """Handles both calls."""

    def __init__(self, handler: EndpointHandler, model: ServedModel, texts: TokenTexts, chat: ChatCompletions) -> None:
        self._handler = handler
        self._model = model
        self._texts = texts
        self._chat = chat

    async def handle(self, body: MessagesRequest, body_bytes: int, caller: Caller, call: ClientCall) -> None:
        """Run the request and send its response into `call`. `body_bytes` is the length of the request body.

        Raises:
            TandemError: its `field` is a parameter of the Messages API.
        """
        translated = self._translated(body)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(renaming(translated.name))
            chat = await self._chat.prepare(translated.chat, body_bytes, caller, call, stack)
            output = MessageOutput(
                self._model.name,
                body.max_tokens,
                self._count_tokens,
                chat.requests[0],
                self._texts,
                chat.parsed[0],
                one_call_only=translated.one_call_only,
                streams=bool(body.stream),
                hides_thinking=hides_thinking(body),
            )
            await respond(self._handler, chat, output, caller, call, stream=bool(body.stream))

    async def count(self, body: CountTokensRequest, body_bytes: int) -> dict[str, Any]:
        """The response of count_tokens: tokens of the prompt, as the model would read it.

        Raises:
            TandemError: its `field` is a parameter of the Messages API.
        """
        translated = self._translated(body)
        with renaming(translated.name):
            return {"input_tokens": await self._chat.count_tokens(translated.chat, body_bytes)}

    def _translated(self, body: PromptFields) -> Translated:
        return Translated(body, self._chat.takes, reasons=self._chat.reasons)

    async def _count_tokens(self, text: str) -> int:
        return len(await self._model.tokenizer.encode(text, add_special_tokens=False))
