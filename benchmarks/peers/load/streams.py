"""A closed-loop client: sends a request, reads the response to its end, sends the next.

Owns the lifecycle of a request at its client, and what is recorded of it. The protocols are in `grpc_door.py`,
`http_door.py` and `leg_door.py`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.load.recorder import Recorder
from benchmarks.peers.words import Words

AFTER_FAILURE_S = 0.5
PROMPT_WORDS = 194
"""About 200 tokens behind a chat template."""


@dataclass(frozen=True)
class Plan:
    """What is asked of whom, and how."""

    door: str
    """grpc, http, contract1 or contract2."""
    addresses: list[str]
    model: str
    streams: int
    max_tokens: int
    ramp_s: float
    """From the first stream's start to the last one's."""
    words: dict[str, Any]
    prompt_words: int = PROMPT_WORDS
    connections: int = 16
    """Of gRPC, at most; HTTP/1.1 has one for each stream."""
    coalesce_ms: int | None = None
    """As the request has it; None: the frontend's own setting."""
    counts_events: bool = False
    """Whether an event counts as a token, where texts are not of our words."""
    starts: dict[str, int] = field(default_factory=dict)
    """Epochs of workers that are asked directly."""
    seed: int = 1


class Load:
    """All streams of this process."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.words = Words(**plan.words)
        self.recorder = Recorder()
        self.open_streams = 0
        self.begun = 0
        self.is_running = True
        self.loop = asyncio.get_running_loop()
        self._prompts: Iterator[tuple[int, str]] = self.words.prompts(plan.prompt_words, random.Random(plan.seed))

    def next_prompt(self) -> tuple[int, str]:
        """A fresh one, with its serial number."""
        return next(self._prompts)

    async def start(self, make: Callable[[int], Stream]) -> None:
        """Return when every stream has begun."""
        begin_s = self.loop.time()
        for number in range(self.plan.streams):
            due_s = begin_s + self.plan.ramp_s * number / self.plan.streams
            await asyncio.sleep(max(0.0, due_s - self.loop.time()))
            make(number).begin()


class Stream:
    """One client. A door says how a request is sent, and calls `got` and `ended`."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.serial = 0
        self.received = 0
        self.on_done: Callable[[str], None] | None = None
        """Called at the end of each request instead of the next one, with what went wrong."""
        self._sent_s = 0.0
        self._last_s = 0.0
        self._is_open = False

    def send(self, prompt: str) -> None:
        """Send a request."""
        raise NotImplementedError

    def begin(self) -> None:
        """Ask."""
        if not self.load.is_running:
            return
        self.serial, prompt = self.load.next_prompt()
        self.received, self._last_s = 0, 0.0
        self._is_open = True
        self.load.open_streams += 1
        self.load.begun += 1
        self._sent_s = time.monotonic()
        self.send(prompt)

    def got(self, count: int, at_s: float) -> None:
        """Tokens have come."""
        recorder = self.load.recorder
        if self._last_s:
            if at_s > self._last_s:
                recorder.gap(at_s, at_s - self._last_s)
        else:
            recorder.first(at_s, self.serial, at_s - self._sent_s)
        self._last_s = at_s
        self.received += count
        recorder.tokens(at_s, count)

    def ended(self, problem: str = "") -> None:
        """The answer is over, whole or with a problem; what comes later of it counts for nothing."""
        if not self._is_open:
            return
        self._is_open = False
        load, now_s = self.load, time.monotonic()
        load.open_streams -= 1
        if not problem and self.received != load.plan.max_tokens:
            problem = f"{self.received} of {load.plan.max_tokens} tokens"
        if self.on_done is not None:
            self.on_done(problem)
        elif problem:
            load.recorder.failure(now_s, problem)
            load.loop.call_later(AFTER_FAILURE_S, self.begin)
        else:
            load.recorder.end(now_s, now_s - self._sent_s)
            self.begin()
