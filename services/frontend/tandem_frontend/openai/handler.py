"""What both completion calls do alike: run the choices, and put their answer together or stream it.

A stream's first byte waits for the first token, so that whatever fails before it still has a status of its own. A
failure after it is the stream's last event, and `[DONE]` does not follow.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.domain.worker import Worker
from tandem.errors import TandemError
from tandem_frontend.call_context import Caller
from tandem_frontend.openai import response
from tandem_frontend.openai.common_params import CHOICES_MAX, CommonFields
from tandem_frontend.openai.merge import ChoiceAnswer, Entries, EventStream
from tandem_frontend.openai.response import UsageSum
from tandem_frontend.pipeline import Generation
from tandem_frontend.preparation.served_model import ServedModel
from tandem_frontend.response.writers import Call


class Choice(Protocol):
    """One answer as it grows; each call of the API has its own shapes."""

    @property
    def parses(self) -> bool:
        """Whether chunks go through a parser that must be waited for: then `parse` takes them, and not `take`."""
        ...

    def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """What a stream shows of a chunk: entries of `choices`, none or more."""
        ...

    async def parse(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """The same, through a parser."""
        ...

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """What a stream shows of the end."""
        ...

    def told(self) -> dict[str, Any]:
        """The whole, after its end: the entry of `choices` in an answer of one piece."""
        ...


class Answer:
    """One request being answered."""

    def __init__(self, head: dict[str, Any], choices: Sequence[Choice], usage: UsageSum) -> None:
        self.head = head
        """What every event and the whole answer begin with: id, object, created, model, fingerprint."""
        self.choices = choices
        self.usage = usage


class EndpointHandler:
    """Runs requests that have been checked and tokenised."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        workers: Callable[[], tuple[Worker, ...]],
        open_requests_max: int,
    ) -> None:
        """`open_requests_max` is the frontend's: more choices than that could never be taken."""
        self.choices_max = min(CHOICES_MAX, open_requests_max)
        """Of one request, over all its prompts."""
        self._generation = generation
        self._model = model
        self._workers = workers
        self._view: tuple[Worker, ...] | None = None
        """That of `_fingerprint`."""
        self._fingerprint = ""

    def head(self, answer_id: str, kind: str) -> dict[str, Any]:
        """What every event of an answer begins with."""
        return {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": self._model.name,
            "system_fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Changes with the weights and with the engine's release. Made once for each view."""
        workers = self._workers()
        if workers is not self._view:
            self._view, self._fingerprint = workers, _fingerprint(workers, self._model.name)
        return self._fingerprint

    async def run(
        self,
        requests: Sequence[pb.GenerateRequest],
        answer: Answer,
        caller: Caller,
        wanted: CommonFields,
        call: Call,
    ) -> None:
        """Answer into a call as the request wants it: in one piece, or as server-sent events.

        Raises:
            TandemError: a choice failed before the first event; its field is the contract's.
        """
        if not wanted.stream:
            await self._generate(requests, answer, caller, Entries())
            choices = [choice.told() for choice in answer.choices]
            call.send(response.whole({**answer.head, "choices": choices, "usage": answer.usage.told()}))
            return
        events = EventStream(call, answer.head, with_usage=wanted.includes_usage)
        try:
            await self._generate(requests, answer, caller, events)
        except Exception as problem:
            if not events.has_begun:
                raise
            events.fail(problem)
            return
        events.end(answer.usage.told())

    async def _generate(
        self, requests: Sequence[pb.GenerateRequest], answer: Answer, caller: Caller, entries: Entries
    ) -> None:
        """Generate all choices at once; the first failure ends the others."""
        if len(requests) == 1 and not answer.choices[0].parses:
            await self._generation.generate(requests[0], caller, ChoiceAnswer(0, answer, entries, None))
            return
        try:
            async with asyncio.TaskGroup() as group:
                for number, request in enumerate(requests):
                    own = ChoiceAnswer(number, answer, entries, group)
                    group.create_task(self._generation.generate(request, caller, own), name=f"choice-{number}")
        except ExceptionGroup as problems:
            # Each one's sentence says what failed; one of them is what the client is told.
            raise next((p for p in problems.exceptions if isinstance(p, TandemError)), problems.exceptions[0]) from None


def _fingerprint(workers: Iterable[Worker], model: str) -> str:
    serving = (
        f"{worker.capabilities.model_digest} {worker.capabilities.engine} {worker.capabilities.engine_version}"
        for worker in workers
        if worker.capabilities.model == model
    )
    return f"fp_{hashlib.sha256(min(serving, default='').encode()).hexdigest()[:10]}"
