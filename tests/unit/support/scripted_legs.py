"""Legs that follow a script instead of running: what each one reports to its sink."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from tandem_frontend.execution.link_leg import Logprobs, Sink

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.errors import TandemError

Word = Callable[[Sink], None]
"""An event that a leg reports."""


def accepted(sink: Sink) -> None:
    sink.accepted()


def unresponsive(sink: Sink) -> None:
    sink.unresponsive()


def tokens(index: int, *token_ids: int) -> Word:
    return lambda sink: sink.tokens(index, token_ids, ())


def finish(reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_LENGTH) -> Word:
    return lambda sink: sink.finish(leg_pb2.LegFinish(reason=reason))


def fail(problem: TandemError) -> Word:
    return lambda sink: sink.fail(problem)


FINISH = finish()
ABORTED = finish(generation_pb2.FINISH_REASON_ABORTED)


class ScriptedLeg:
    """A leg that says its words, one in each turn of the loop; `say` adds one. Held like `worker_link.Leg`."""

    def __init__(self, *words: Word) -> None:
        self._words = list(words)
        self._sink: Sink | None = None
        self.aborted = asyncio.Event()

    def play(self, sink: Sink) -> ScriptedLeg:
        self._sink = sink
        self._next()
        return self

    def say(self, word: Word) -> None:
        self._words.append(word)
        if len(self._words) == 1:
            self._next()

    def abort(self) -> None:
        self.aborted.set()
        self._words.clear()

    def _next(self) -> None:
        if self._sink is not None and self._words:
            asyncio.get_running_loop().call_soon(self._speak)

    def _speak(self) -> None:
        if self._words and not self.aborted.is_set():
            word = self._words.pop(0)
            assert self._sink is not None
            word(self._sink)
            self._next()


class Gathered:
    """Where the tokens of a request go: a `request_stream.TokenSink`."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.token_ids: list[int] = []
        self._stop_after = stop_after
        self.ends_the_legs = False

    @property
    def is_over(self) -> bool:
        return self._stop_after is not None and len(self.token_ids) >= self._stop_after

    def take(self, token_ids: Sequence[int], logprobs: Logprobs) -> None:
        self.token_ids += token_ids


class Outbox:
    """A response that keeps its chunks: a `relay.Outlet` whose client reads when a test says so."""

    def __init__(self) -> None:
        self.is_writable = True
        self.chunks: list[pb.GenerateChunk] = []
        self._callback: Callable[[], None] = lambda: None

    def on_writable(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        self.chunks.append(chunk)

    def read(self, *, reads: bool) -> None:
        """The client reads, or stops reading."""
        self.is_writable = reads
        if reads:
            self._callback()

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in self.chunks for token_id in chunk.token_ids]
