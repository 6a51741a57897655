"""A client's stream under any cutting into steps and chunks and any number of continuations, against the whole answer.

The engine behind it draws each token from all tokens before it, so a continuation that begins in the wrong place, or
with the wrong tokens, ends in another text. Text, stop strings and indices are judged when the stream has its finish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tandem_frontend.execution.continuation import continued
from tandem_frontend.response.detokenizer import REPLACEMENT, Detokenizer
from tandem_frontend.response.relay import Relay
from tandem_frontend.response.stop_matching import StopMatcher, StopTokens

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2, sampling_pb2
from tandem.observability.request_trace import RequestTrace
from tests.unit.support.examples import examples
from tests.unit.support.scripted_legs import Outbox

PIECES = (
    *(b"", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x99", b"\x82", "é".encode(), "🙂".encode()),
    *(b" ", b"a", b"b", b"a", b"b", b"aa", b"ab", b"ba"),
)
"""Of tokens: the first is the end of a sequence; some are parts of a character only."""
EOS = 0
PROMPT = (9, 10, 8)
CACHED_TOKENS = 64


class Pieces:
    """A tokenizer of bytes."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(PIECES[token_id] for token_id in token_ids).decode(errors="replace")


def next_token(sequence: Sequence[int], seed: int) -> int:
    return hashlib.sha256(bytes([*sequence, seed])).digest()[0] % len(PIECES)


@dataclass(frozen=True)
class Wanted:
    """What the client has asked for."""

    seed: int
    stops: list[str]
    stop_token_ids: list[int]
    max_tokens: int
    min_tokens: int
    ignore_eos: bool

    def answer(self) -> list[int]:
        sequence = list(PROMPT)
        for _ in range(self.max_tokens):
            sequence.append(next_token(sequence, self.seed))
        return sequence[len(PROMPT) :]

    def stop_place(self) -> int | None:
        """The place of the first token that ends it, from 1."""
        ids = {*self.stop_token_ids, *(() if self.ignore_eos else (EOS,))}
        places = (place for place, token_id in enumerate(self.answer(), 1) if token_id in ids)
        return next((place for place in places if place > self.min_tokens), None)

    def expected(self) -> tuple[str, int, str | None]:
        """Text, number of tokens, and the stop string that ended it: by a search of the whole text."""
        stop_place = self.stop_place()
        ids = self.answer()[: self.max_tokens if stop_place is None else stop_place - 1]
        text, known_chars = Pieces().decode(ids), 0
        for place in range(1, len(ids) + 1):
            certain_chars = len(Pieces().decode(ids[:place]).rstrip(REPLACEMENT))
            for end in range(known_chars + 1, certain_chars + 1):
                ending = [stop for stop in self.stops if text[:end].endswith(stop)]
                if ending and place > self.min_tokens:
                    stop = max(ending, key=len)
                    return text[: end - len(stop)], place, stop
            known_chars = max(known_chars, certain_chars)
        return text, self.max_tokens if stop_place is None else stop_place, None


OVERLAPPING = ("aab", "abab", "aba", "bba")
"""A stop string that has begun may begin anew inside of what has matched."""
WANTED = st.builds(
    Wanted,
    seed=st.integers(0, 255),
    stops=st.lists(st.text("ab é🙂", min_size=1, max_size=4) | st.sampled_from(OVERLAPPING), max_size=3),
    stop_token_ids=st.lists(st.integers(1, 8), max_size=1),
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 6),
    ignore_eos=st.booleans(),
)


class ScriptedCoalescing:
    """A process that is as busy as a rule sets it, and looks at held chunks when a rule says so."""

    hold_max_s = 1.0

    def __init__(self) -> None:
        self.pressure = 0.0
        self.held: list[Any] = []

    def hold(self, stream: Any) -> None:
        self.held.append(stream)

    def flush(self) -> None:
        held, self.held = self.held, []
        for stream in held:
            stream.flush()


class ScriptedLoop:
    """A clock on which every two looks are a little apart."""

    def __init__(self) -> None:
        self._now_s = 10.0

    def time(self) -> float:
        self._now_s += 0.1
        return self._now_s


class RelayMachine(RuleBasedStateMachine):
    """One stream; `leg` is what the present attempt was sent."""

    @initialize(wanted=WANTED)
    def ask(self, wanted: Wanted) -> None:
        self.wanted = wanted
        stop_tokens = StopTokens(wanted.stop_token_ids, (EOS,), wanted.min_tokens, ignore_eos=wanted.ignore_eos)
        self.outbox, self.coalescing = Outbox(), ScriptedCoalescing()
        coalescing: Any = self.coalescing
        loop: Any = ScriptedLoop()
        detokenizer, stops = Detokenizer(Pieces(), PROMPT), StopMatcher(wanted.stops)
        self.relay = Relay(detokenizer, stops, stop_tokens, RequestTrace(), self.outbox, coalescing, loop=loop)
        self.is_open = False
        stopping = sampling_pb2.Stopping(max_tokens=wanted.max_tokens, min_tokens=wanted.min_tokens)
        self.whole_leg = leg_pb2.LegRequest(token_ids=PROMPT, stopping=stopping)
        self.leg, self.emitted = self.whole_leg, list[int]()
        self.sent: list[int] = []
        self.finishes: list[pb.GenerateFinish] = []

    @precondition(lambda self: self.finishes)
    @rule(wanted=WANTED)
    def ask_again(self, wanted: Wanted) -> None:
        self.ask(wanted)

    @property
    def left(self) -> int:
        return 0 if self.relay.is_over else self.leg.stopping.max_tokens - len(self.emitted)

    @precondition(lambda self: not self.finishes and self.left)
    @rule(count=st.integers(1, 5))
    def tokens_come(self, count: int) -> None:
        token_ids = []
        for _ in range(min(count, self.left)):
            token_id = next_token([*self.leg.token_ids, *self.emitted], self.wanted.seed)
            self.emitted.append(token_id)
            token_ids.append(token_id)
        self.sent += token_ids
        self.relay.take(token_ids, [generation_pb2.TokenLogprob(token_id=token_id) for token_id in token_ids])

    @precondition(lambda self: not self.finishes)
    @rule(pressure=st.sampled_from((0.0, 0.5, 1.0)))
    def the_process_is_busy(self, pressure: float) -> None:
        self.coalescing.pressure = pressure

    @precondition(lambda self: not self.finishes)
    @rule()
    def held_chunks_are_due(self) -> None:
        self.coalescing.flush()

    @precondition(lambda self: not self.finishes)
    @rule(reads=st.booleans())
    def the_client_reads(self, reads: bool) -> None:
        self.outbox.read(reads=reads)

    @precondition(lambda self: not self.finishes and not self.is_open)
    @rule()
    def the_legs_are_taken(self) -> None:
        assert not self.outbox.chunks, "a chunk before the client knows that its request was taken"
        self.is_open = True
        self.relay.open()

    @precondition(lambda self: not self.finishes and self.left)
    @rule()
    def the_attempt_breaks(self) -> None:
        """Another one goes on from the token after the last."""
        self.leg = continued(self.whole_leg, self.sent) if self.sent else self.whole_leg
        self.emitted = []

    @precondition(lambda self: not self.finishes and not self.left)
    @rule()
    def it_is_over(self) -> None:
        end = leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
        prefill = leg_pb2.LegFinish(reason=generation_pb2.FINISH_REASON_LENGTH)
        prefill.usage.cached_tokens = CACHED_TOKENS
        if not self.is_open:
            self.the_legs_are_taken()
        finish = self.relay.finish(len(PROMPT), None if self.relay.ends_the_legs else end, prefill, pb.Route())
        self.coalescing.flush()
        self.outbox.read(reads=True)
        self.finishes.append(finish)
        self._judge(finish)

    def _judge(self, finish: pb.GenerateFinish) -> None:
        text, count, stop = self.wanted.expected()
        chunks = self.outbox.chunks
        assert self.outbox.text == text
        assert self.outbox.token_ids == self.wanted.answer()[:count]
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        for chunk in chunks:
            assert [logprob.token_id for logprob in chunk.logprobs] == list(chunk.token_ids)
        assert finish.usage.completion_tokens == count
        assert finish.usage.cached_tokens <= finish.usage.prompt_tokens == len(PROMPT)
        assert finish.matched_stop.stop == (stop or "")
        is_stopped = stop is not None or self.wanted.stop_place() is not None
        expected = generation_pb2.FINISH_REASON_STOP if is_stopped else generation_pb2.FINISH_REASON_LENGTH
        assert finish.reason == expected

    def teardown(self) -> None:
        """Whatever the rules have done, the stream comes to its one finish."""
        if not hasattr(self, "relay"):
            return
        while self.left and not self.finishes:
            self.tokens_come(3)
        if not self.finishes:
            self.it_is_over()
        assert len(self.finishes) == 1


TestRelay = RelayMachine.TestCase
TestRelay.settings = settings(max_examples=examples(150), stateful_step_count=30, deadline=None)
