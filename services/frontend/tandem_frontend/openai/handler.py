"""What both completion endpoints share: run one generation per choice, and merge or stream their output.

The first byte of a stream is sent with the first token, or as a comment when that takes long, so a failure before it
still gets an HTTP status of its own. A failure after it becomes the stream's last event, and `[DONE]` is not sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Worker
from tandem.errors import TandemError
from tandem_frontend.call_context import Caller
from tandem_frontend.openai import response
from tandem_frontend.openai.common_params import CHOICES_MAX, CommonFields
from tandem_frontend.openai.event_response import EventStream
from tandem_frontend.openai.merge import ChoiceSink, EntrySink
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.response.writers import Call, ClientCall


class Choice(Protocol):
    """One choice of a response while it is generated; each endpoint has its own shape."""

    @property
    def parses(self) -> bool:
        """Whether chunks go through an asynchronous parser: they then go to `parse`, not to `take`."""
        ...

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """Entries of `choices` for a chunk in a streamed response; may be empty."""
        ...

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The same, through a parser."""
        ...

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """The last entries of `choices` in a streamed response, with the finish reason."""
        ...

    def as_json(self) -> dict[str, Any]:
        """The entry of `choices` in a response that is not streamed; call it after `end`."""
        ...


class ApiResponse:
    """The response to one request while it is generated."""

    def __init__(
        self, head: dict[str, Any], choices: Sequence[Choice], usage: UsageSum, *, has_tool_grammar: bool = False
    ) -> None:
        self.head = head
        """First fields of every event, or of the one body: id, object, created, model, system_fingerprint."""
        self.choices = choices
        self.usage = usage
        self.has_tool_grammar = has_tool_grammar
        """Whether the grammar of its generations was made of the request's tools."""


class EndpointHandler:
    """Runs requests that have been validated and tokenised."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        *,
        comment_s: float = 0,
    ) -> None:
        """`workers` is the registry's view, for the fingerprint. `comment_s`: see the setting stream_comment_s."""
        self.choices_max = min(CHOICES_MAX, generation.tenant_requests_max)
        """Most choices of one request, over all its prompts: more could never be admitted."""
        self._generation = generation
        self._model = model
        self._workers = workers
        self.comment_s = comment_s
        self._view: tuple[Worker, ...] | None = None
        """The view that `_fingerprint` was computed from."""
        self._fingerprint = ""

    def head(self, response_id: str, kind: str) -> dict[str, Any]:
        """The first fields of every event of a response."""
        return {
            "id": response_id,
            "object": kind,
            "created": int(time.time()),
            "model": self._model.name,
            "system_fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """`system_fingerprint`: changes with the weights and the engine's release. Computed once per registry view."""
        workers = self._workers()
        if workers is not self._view:
            self._view, self._fingerprint = workers, _fingerprint(workers, self._model.engine_name)
        return self._fingerprint

    def charged(
        self, caller: Caller, call: ClientCall, choice_count: int, prompt_count: int = 1
    ) -> AbstractContextManager[None]:
        """Charge the caller for a call before its prompts are rendered; each choice of a prompt counts as one request.

        Raises:
            Draining, Overloaded, QuotaExceeded, InvalidRequest: the choices would not be admitted.
        """
        count = choice_count * prompt_count
        return self._generation.charged(caller, call, count, choices_per_prompt=choice_count)

    async def run(
        self,
        requests: Sequence[pb.GenerateRequest],
        result: ApiResponse,
        caller: Caller,
        body: CommonFields,
        call: Call,
    ) -> None:
        """Generate all choices and send the response: one JSON body, or server-sent events where `stream` is set.

        Raises:
            TandemError: a choice failed before the first event; its `field` is a field of the contract.
        """
        if not body.stream:
            await self.generate(requests, result, caller, EntrySink())
            choices = [choice.as_json() for choice in result.choices]
            call.send(response.whole({**result.head, "choices": choices, "usage": result.usage.as_json()}))
            return
        running = result.usage if body.repeats_usage else None
        events = EventStream(call, result.head, with_usage=body.includes_usage, running_usage=running)
        try:
            with events.kept_alive(self.comment_s):
                await self.generate(requests, result, caller, events)
        except Exception as problem:
            # Nothing was sent yet, so the error can still be an HTTP status.
            if not events.has_begun:
                raise
            events.fail(problem)
            return
        events.end(result.usage.as_json())

    async def generate(
        self, requests: Sequence[pb.GenerateRequest], result: ApiResponse, caller: Caller, entries: EntrySink
    ) -> None:
        """Generate all choices concurrently into `entries`; the first failure cancels the others.

        Raises:
            TandemError: a choice failed; its `field` is a field of the contract.
        """
        # The common request: it needs no task besides its own.
        if len(requests) == 1 and not result.choices[0].parses:
            await self._run(requests[0], caller, ChoiceSink(0, result, entries, None), result)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(requests):
                    own = ChoiceSink(number, result, entries, group)
                    group.create_task(self._run(request, caller, own, result), name=f"choice-{number}")
        except ExceptionGroup as problems:
            # The client gets one error. A TandemError is written for clients; any other exception is a defect.
            raise next((p for p in problems.exceptions if isinstance(p, TandemError)), problems.exceptions[0]) from None

    async def _run(self, request: pb.GenerateRequest, caller: Caller, sink: ChoiceSink, result: ApiResponse) -> None:
        if result.has_tool_grammar:
            await self._generation.generate(request, caller, sink, has_tool_grammar=True)
        else:
            await self._generation.generate(request, caller, sink)


def _fingerprint(workers: Iterable[Worker], model: str) -> str:
    serving = (
        f"{worker.capabilities.model_digest} {worker.capabilities.engine} {worker.capabilities.engine_version}"
        for worker in workers
        if worker.capabilities.model == model
    )
    # The smallest, because the order of workers in a view carries no meaning.
    return f"fp_{hashlib.sha256(min(serving, default='').encode()).hexdigest()[:10]}"
