"""POST /v1/completions: prompts as text or token ids, one or several, to text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.errors import InvalidRequest
from tandem_frontend.call_context import Caller
from tandem_frontend.openai.handler import Answer, EndpointHandler
from tandem_frontend.openai.logprobs import StopFilter, TokenTexts, completion_logprobs
from tandem_frontend.openai.response import UsageSum, finish_reason
from tandem_frontend.openai.schemas import CompletionRequest
from tandem_frontend.openai.translation import completion_request, for_choice
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.preparation.validation import check_prompt_ids, check_text, check_token_count
from tandem_frontend.response.writers import Call


class Completions:
    """The call."""

    def __init__(self, door: EndpointHandler, model: ServedModel, texts: TokenTexts) -> None:
        self._door = door
        self._model = model
        self._texts = texts

    async def answer(self, wanted: CompletionRequest, caller: Caller, call: Call) -> None:
        """Answer a request into its call.

        Raises:
            TandemError: its field is the contract's, or the parameter's own.
        """
        self._model.check_name(wanted.model)
        request = completion_request(wanted)
        prompts = await self._prompts(wanted)
        if len(prompts) * wanted.choice_count > self._door.choices_max:
            raise InvalidRequest(
                "n", f"with {len(prompts)} prompts makes more than {self._door.choices_max} choices of one request"
            )
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        requests: list[pb.GenerateRequest] = []
        choices: list[CompletionChoice] = []
        for text, token_ids in prompts:
            for number in range(wanted.choice_count):
                requests.append(for_choice(request, token_ids, number))
                choices.append(CompletionChoice(len(choices), text if wanted.echo else "", request, self._texts))
        answer = Answer(self._door.head(answer_id, "text_completion"), choices, UsageSum(wanted.choice_count))
        await self._door.run(requests, answer, caller, wanted, call)

    async def _prompts(self, wanted: CompletionRequest) -> list[tuple[str, Sequence[int]]]:
        """Text (where it will be echoed) and token ids of each prompt."""
        tokenizer = self._model.tokenizer
        given: list[Any] = wanted.prompt if isinstance(wanted.prompt, list) else [wanted.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given:
            raise InvalidRequest("prompt", "must not be empty")
        if len(given) > self._door.choices_max:
            raise InvalidRequest("prompt", f"{len(given)} prompts are more than {self._door.choices_max}")
        prompts: list[tuple[str, Sequence[int]]] = []
        for prompt in given:
            if not prompt:
                raise InvalidRequest("prompt", "must not be empty")
            # Many short ones are as much work as a long one; others are served between them.
            await asyncio.sleep(0)
            if isinstance(prompt, str):
                check_text("prompt", prompt, tokenizer)
                prompts.append((prompt, await tokenizer.encode(prompt, add_special_tokens=True)))
            else:
                check_token_count("prompt", len(prompt), tokenizer)
                await check_prompt_ids("prompt", prompt, tokenizer.vocabulary_size)
                prompts.append((await tokenizer.decode_all(prompt) if wanted.echo else "", prompt))
        return prompts


class CompletionChoice:
    """One answer of POST /v1/completions."""

    def __init__(self, index: int, echoed: str, request: pb.GenerateRequest, texts: TokenTexts) -> None:
        self._index = index
        self._texts = texts
        self._echoed = echoed
        self._pieces: list[str] = []
        self._shown = StopFilter(request, texts.eos_token_ids) if request.HasField("logprobs") else None
        self._logprobs: dict[str, list[Any]] = completion_logprobs((), texts, 0)
        self._text_chars = 0
        self._reason: str | None = None

    parses = False
    """See `door.Choice`."""

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """One entry, or none where a chunk shows nothing yet."""
        text, self._echoed = self._echoed + chunk.text, ""
        kept = self._shown.keep(chunk.logprobs) if self._shown is not None else ()
        if not text and not kept:
            return []
        self._pieces.append(text)
        self._text_chars += len(text)
        logprobs = None
        if self._shown is not None:
            logprobs = completion_logprobs(kept, self._texts, self._text_chars)
            for name, values in logprobs.items():
                self._logprobs[name] += values
        return [self._entry(text, logprobs)]

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """See `door.Choice`: there is no parser here."""
        return self.take(chunk)

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The entry that tells why."""
        text, self._echoed = self._echoed, ""
        self._pieces.append(text)
        self._reason = finish_reason(finish)
        return [self._entry(text, None)]

    def told(self) -> dict[str, Any]:
        """The whole answer."""
        return self._entry("".join(self._pieces), None if self._shown is None else self._logprobs)

    def _entry(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "index": self._index, "logprobs": logprobs, "finish_reason": self._reason}
