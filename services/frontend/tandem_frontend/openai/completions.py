"""POST /v1/completions: prompts as text or token ids, one or several, to text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import InvalidRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.handler import ApiResponse, EndpointHandler
from tandem_frontend.openai.logprobs import TokenTexts, VisibleTokens, completion_logprobs
from tandem_frontend.openai.response import UsageSum, finish_reason
from tandem_frontend.openai.schemas import CompletionRequest
from tandem_frontend.openai.translation import completion_request, for_choice
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.validation import check_prompt_ids, check_text, check_token_count
from tandem_frontend.response.writers import Call, ClientCall


class Completions:
    """Handles POST /v1/completions."""

    def __init__(self, handler: EndpointHandler, model: ServedModel, texts: TokenTexts) -> None:
        self._handler = handler
        self._model = model
        self._texts = texts

    async def handle(self, body: CompletionRequest, caller: Caller, call: ClientCall) -> None:
        """Run the request and send its response into `call`.

        Raises:
            TandemError: its `field` is a field of the contract or an OpenAI parameter.
        """
        request = completion_request(body)
        given = self._given(body)
        most, choice_count = self._handler.choices_max, body.choice_count
        if len(given) * choice_count > most:
            raise InvalidRequest("n", f"{choice_count} choices for each of {len(given)} prompts exceed {most} in all")
        with self._handler.charged(caller, call, choice_count, len(given)):
            await self._run(given, request, body, caller, call)

    async def _run(
        self, given: list[Any], request: pb.GenerateRequest, body: CompletionRequest, caller: Caller, call: Call
    ) -> None:
        prompts = await self._prompts(given, body)
        response_id = f"cmpl-{uuid.uuid4().hex}"
        requests: list[pb.GenerateRequest] = []
        choices: list[CompletionChoice] = []
        for text, token_ids in prompts:
            for number in range(body.choice_count):
                requests.append(for_choice(request, token_ids, number))
                choices.append(self._choice(len(choices), text, token_ids, request, body))
        usage = UsageSum(body.choice_count, is_echo_only=body.is_echo_only)
        response = ApiResponse(self._handler.head(response_id, "text_completion"), choices, usage)
        await self._handler.run(requests, response, caller, body, call)

    def _choice(
        self, index: int, text: str, token_ids: Sequence[int], request: pb.GenerateRequest, body: CompletionRequest
    ) -> CompletionChoice:
        if body.is_echo_only or body.echoes_logprobs:
            return EchoedChoice(index, text, token_ids, request, self._texts, is_alone=body.is_echo_only)
        return CompletionChoice(index, text if body.echo else "", request, self._texts)

    def _given(self, body: CompletionRequest) -> list[Any]:
        """The prompts as the client wrote them: texts, or lists of token ids."""
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        # A list of integers is one prompt given as token ids, not a list of prompts.
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise InvalidRequest("prompt", "must not be empty")
        if len(given) > self._handler.choices_max:
            raise InvalidRequest("prompt", f"must be at most {self._handler.choices_max} prompts, not {len(given)}")
        return given

    async def _prompts(self, given: list[Any], body: CompletionRequest) -> list[tuple[str, Sequence[int]]]:
        """Text (empty unless it is echoed) and token ids of each prompt."""
        tokenizer = self._model.tokenizer
        prompts: list[tuple[str, Sequence[int]]] = []
        for prompt in given:
            if not prompt:
                raise InvalidRequest("prompt", "must not be empty")
            # Many short prompts are as much work as a long one: the event loop runs other requests between them.
            await asyncio.sleep(0)
            if isinstance(prompt, str):
                check_text("prompt", prompt, tokenizer)
                prompts.append((prompt, await tokenizer.encode(prompt, add_special_tokens=True)))
            else:
                check_token_count("prompt", len(prompt), tokenizer)
                await check_prompt_ids("prompt", prompt, tokenizer.vocabulary_size)
                prompts.append((await tokenizer.decode_all(prompt) if body.echo else "", prompt))
        return prompts


class CompletionChoice:
    """One choice of POST /v1/completions."""

    def __init__(self, index: int, echoed: str, request: pb.GenerateRequest, texts: TokenTexts) -> None:
        self._index = index
        self._texts = texts
        self._echoed = echoed
        self._pieces: list[str] = []
        self._visible = VisibleTokens(request, texts) if request.HasField("logprobs") else None
        self._logprobs: dict[str, list[Any]] = completion_logprobs((), texts, 0)
        self._text_chars = 0
        self._reason: str | None = None

    parses = False
    """See `handler.Choice`."""

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """One entry; none for a chunk without text and without log probabilities."""
        # The echo travels with the first text: a response without any still echoes, in `end`.
        text, self._echoed = self._echoed + chunk.text, ""
        kept = self._visible.take(chunk) if self._visible is not None else ()
        if not text and not kept:
            return []
        self._pieces.append(text)
        self._text_chars += len(text)
        return [self._entry(text, self._noted(kept))]

    def _noted(self, kept: Sequence[generation_pb2.TokenLogprob]) -> dict[str, Any] | None:
        if self._visible is None:
            return None
        logprobs = completion_logprobs(kept, self._texts, self._text_chars, self._visible.cut)
        for name, values in logprobs.items():
            self._logprobs[name] += values
        return logprobs

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """See `handler.Choice`. Never called by the handler: completions have no parser."""
        return self.take(chunk)

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The entry with the finish reason; it carries an echo that no chunk carried."""
        text, self._echoed = self._echoed, ""
        self._pieces.append(text)
        rest = self._visible.end(finish) if self._visible is not None else ()
        logprobs = self._noted(rest) if rest else None
        self._reason = finish_reason(finish)
        return [self._entry(text, logprobs)]

    def as_json(self) -> dict[str, Any]:
        """The entry of `choices` in a response that is not streamed; complete after `end`."""
        return self._entry("".join(self._pieces), None if self._visible is None else self._logprobs)

    def _entry(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "index": self._index, "logprobs": logprobs, "finish_reason": self._reason}


class EchoedChoice(CompletionChoice):
    """One choice whose prompt comes back with its log probabilities, or alone. Whole: an event stream has none.

    Harnesses count tokens by position, so each token has an entry here, a stop token too.
    """

    def __init__(
        self,
        index: int,
        echoed: str,
        prompt: Sequence[int],
        request: pb.GenerateRequest,
        texts: TokenTexts,
        *,
        is_alone: bool,
    ) -> None:
        """`is_alone`: nothing that is generated belongs to the response."""
        super().__init__(index, echoed, request, texts)
        self._prompt = prompt
        self._is_alone = is_alone
        self._has_logprobs = request.HasField("logprobs")
        self._entries: list[generation_pb2.TokenLogprob] = []
        self._whole: dict[str, Any] | None = None

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """Nothing: the response is built at the end."""
        if not self._is_alone:
            self._pieces.append(chunk.text)
            self._entries += chunk.logprobs
        return []

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The one entry."""
        self._reason = "length" if self._is_alone else finish_reason(finish)
        text = self._echoed + "".join(self._pieces)
        logprobs = None
        if self._has_logprobs:
            first = generation_pb2.TokenLogprob(token_id=self._prompt[0])
            entries = [first, *finish.prompt_logprobs, *self._entries]
            logprobs = completion_logprobs(entries, self._texts, len(text))
            # It follows nothing, so it has no probability.
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        self._whole = self._entry(text, logprobs)
        return [self._whole]

    def as_json(self) -> dict[str, Any]:
        """See `CompletionChoice`."""
        assert self._whole is not None, "complete after `end`"
        return self._whole
