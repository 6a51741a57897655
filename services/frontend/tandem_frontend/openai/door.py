"""What both completion calls do alike: run the choices, put their answer together or stream it, and tell failures.

A stream's first byte waits for the first token, so that whatever fails before it still has a status of its own. A
failure after it is the stream's last event, and `[DONE]` does not follow.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from google.api import httpbody_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2
from tandem.errors import RequestAborted
from tandem.model.worker import Worker
from tandem_frontend.caller import Caller
from tandem_frontend.generation import Generation
from tandem_frontend.http_errors import last_event
from tandem_frontend.models import ServedModel
from tandem_frontend.openai import wire
from tandem_frontend.openai.choices import merged
from tandem_frontend.openai.fields import CHOICES_MAX, CommonFields
from tandem_frontend.openai.usage import UsageSum

Body: TypeAlias = httpbody_pb2.HttpBody


class Choice(Protocol):
    """One answer as it grows; each call of the API has its own shapes."""

    async def take(self, chunk: pb.GenerateChunk) -> list[dict[str, Any]]:
        """What a stream tells of a chunk: entries of `choices`, none or more."""
        ...

    async def end(self, finish: pb.GenerateFinish) -> list[dict[str, Any]]:
        """What a stream tells of the end."""
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


class Door:
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

    def bodies(
        self, requests: Sequence[pb.GenerateRequest], answer: Answer, caller: Caller, wanted: CommonFields
    ) -> AsyncGenerator[Body, None]:
        """The answer, as the request wants it: one piece, or server-sent events.

        Raises:
            TandemError: a choice failed before the first body; its field is the contract's.
        """
        if wanted.stream:
            return self._stream(requests, answer, caller, with_usage=wanted.includes_usage)
        return self._whole(requests, answer, caller)

    async def _whole(
        self, requests: Sequence[pb.GenerateRequest], answer: Answer, caller: Caller
    ) -> AsyncGenerator[Body, None]:
        async with contextlib.aclosing(self._run(requests, caller)) as events:
            async for number, event in events:
                await _told(answer, number, event)
        choices = [choice.told() for choice in answer.choices]
        yield wire.whole({**answer.head, "choices": choices, "usage": answer.usage.told()})

    async def _stream(
        self, requests: Sequence[pb.GenerateRequest], answer: Answer, caller: Caller, *, with_usage: bool
    ) -> AsyncGenerator[Body, None]:
        has_begun = False
        # With include_usage every event has the field, and only the last one a value.
        tail = {"usage": None} if with_usage else {}
        try:
            async with contextlib.aclosing(self._run(requests, caller)) as events:
                async for number, event in events:
                    for choice in await _told(answer, number, event):
                        yield _event(wire.event({**answer.head, "choices": [choice], **tail}), has_begun)
                        has_begun = True
        except Exception as problem:
            if not has_begun:
                raise
            yield _event(wire.event(last_event(problem)), has_begun)
            return
        if with_usage:
            yield _event(wire.event({**answer.head, "choices": [], "usage": answer.usage.told()}), has_begun)
        yield _event(wire.DONE, has_begun)

    def _run(self, requests: Sequence[pb.GenerateRequest], caller: Caller) -> AsyncGenerator[tuple[int, Any], None]:
        return merged([self._generation.generate(request, caller) for request in requests])


def _fingerprint(workers: Iterable[Worker], model: str) -> str:
    serving = (
        f"{worker.capabilities.model_digest} {worker.capabilities.engine} {worker.capabilities.engine_version}"
        for worker in workers
        if worker.capabilities.model == model
    )
    return f"fp_{hashlib.sha256(min(serving, default='').encode()).hexdigest()[:10]}"


async def _told(answer: Answer, number: int, event: Any) -> list[dict[str, Any]]:
    if isinstance(event, pb.GenerateChunk):
        return await answer.choices[number].take(event)
    if isinstance(event, pb.GenerateFinish):
        if event.reason == generation_pb2.FINISH_REASON_ABORTED:
            raise RequestAborted("the generation was aborted")
        answer.usage.add(number, event.usage)
        return await answer.choices[number].end(event)
    return []


def _event(data: bytes, has_begun: bool) -> Body:
    """The edge takes the content type from the first message."""
    return Body(data=data) if has_begun else Body(content_type=wire.EVENTS, data=data)
