"""The pace of a fake engine: which of its open streams get tokens in which step.

Owns time: steps on a fixed grid while anything is open, at once after rest. An engine that is late makes its late steps
up one by one. Owns the record of how long each request waited here for its first token. Speaks no protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

SILENCE_S = 0.3
"""A stream without tokens for so long is to be called alive; contracts ask for a word within 0.4 s."""
TOKENS_MAX = 2**31
LATE_STEPS_MAX = 5
"""An engine further behind gives the time up."""


@dataclass(frozen=True)
class Pace:
    """How tokens come."""

    token_s: float
    """Between two tokens of one stream; 0: the whole answer at once."""
    step_s: float = 0.0
    """Between two steps of the engine; 0: as `token_s`. With shorter ones the streams take turns."""
    tokens_per_step: int = 1
    """Of one stream in one of its steps."""

    @property
    def tokens_at_once(self) -> int:
        """Of one stream in one of its steps."""
        return self.tokens_per_step if self.token_s else TOKENS_MAX

    @property
    def engine_step_s(self) -> float:
        """Between two steps."""
        return self.step_s or self.token_s

    @property
    def steps_per_token(self) -> int:
        """From one step of a stream to its next."""
        return max(1, round(self.token_s / self.engine_step_s)) if self.token_s else 1

    def answer_s(self, tokens: int) -> float:
        """How long a whole answer takes."""
        return self.token_s * tokens / self.tokens_per_step


class OpenStream:
    """One answer that is being given. Protocols add what they need."""

    __slots__ = ("arrived_s", "is_open", "sent", "serial", "total", "word_at")

    def __init__(self, serial: int | None, total: int, arrived_s: float) -> None:
        self.serial = serial
        """Of its prompt; None: it has none."""
        self.total = total
        """Tokens that the answer is to have."""
        self.sent = 0
        self.arrived_s = arrived_s
        """By the monotonic clock; a loop's own may be a rough one."""
        self.is_open = True
        self.word_at = (serial or 0) * 31
        """Where in the list of words its answer begins: answers differ."""

    def take(self, most: int) -> int:
        """How many tokens it gets, of so many that there are."""
        return min(most, self.total - self.sent)


OnStep = Callable[[list[OpenStream], list[OpenStream]], None]
"""Given the streams that get tokens now, and those that are to be called alive."""


class Steps:
    """Runs the steps of one engine. The callback raises `sent` of each stream that gets tokens."""

    def __init__(self, pace: Pace, on_step: OnStep, waits: list[tuple[int, float]]) -> None:
        """`waits` is given the serial of each stream and how long it has waited for its first token, in seconds."""
        self._pace = pace
        self._on_step = on_step
        self._waits = waits
        self._loop = asyncio.get_running_loop()
        self._step = 0
        self._next_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._open = 0
        self._due: dict[int, list[OpenStream]] = {}
        self._silent: dict[int, list[tuple[OpenStream, int]]] = {}
        """By step: streams to be called alive, with what they had been sent when that was decided."""
        # Streams with tokens more often than this are never silent.
        self._silent_steps = 0
        if pace.token_s > SILENCE_S:
            self._silent_steps = max(1, int(SILENCE_S / pace.engine_step_s))

    @property
    def open_streams(self) -> int:
        """How many there are."""
        return self._open

    def add(self, stream: OpenStream) -> None:
        """Take a stream: it gets its first token in the next step."""
        self._open += 1
        self._due.setdefault(self._step + 1, []).append(stream)
        if self._timer is None:
            self._next_s = self._loop.time()
            self._timer = self._loop.call_soon(self._tick)

    def remove(self, stream: OpenStream) -> None:
        """Drop a stream whose caller has left."""
        if stream.is_open:
            stream.is_open = False
            self._open -= 1

    def _tick(self) -> None:
        self._timer = None
        self._run()
        if not self._open:
            return
        step_s = self._pace.engine_step_s
        now_s = self._loop.time()
        self._next_s = max(self._next_s + step_s, now_s - LATE_STEPS_MAX * step_s)
        self._timer = self._loop.call_at(self._next_s, self._tick)

    def _run(self) -> None:
        """One step."""
        self._step += 1
        due = [stream for stream in self._due.pop(self._step, ()) if stream.is_open]
        silent = [stream for stream, sent in self._silent.pop(self._step, ()) if stream.is_open and stream.sent == sent]
        now_s = time.monotonic()
        for stream in due:
            if not stream.sent and stream.serial is not None:
                self._waits.append((stream.serial, now_s - stream.arrived_s))
        if due or silent:
            self._on_step(due, silent)
        self._plan(due, silent)

    def _plan(self, due: list[OpenStream], silent: list[OpenStream]) -> None:
        """Which steps come next for those of this one."""
        goes_on = [stream for stream in due if stream.sent < stream.total]
        for stream in due:
            if stream.sent >= stream.total:
                stream.is_open = False
                self._open -= 1
        if goes_on:
            self._due.setdefault(self._step + self._pace.steps_per_token, []).extend(goes_on)
        if self._silent_steps and (goes_on or silent):
            later = self._silent.setdefault(self._step + self._silent_steps, [])
            later.extend((stream, stream.sent) for stream in (*goes_on, *silent))
