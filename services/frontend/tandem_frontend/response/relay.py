"""The relay: turns decode's tokens into chunks for the client, and the finishes of both legs into one.

Owns what the client sees: contiguous chunk indices, only text that cannot change any more, nothing of a stop string,
the same text however the stream is cut. Waits for nothing and cancels nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from google.protobuf import duration_pb2

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.types.v1 import generation_pb2, leg_pb2
from tandem.observability.request_trace import RequestTrace, kv_transfer_bytes
from tandem.rpc.convert import timestamp
from tandem_frontend.response.coalescing import Coalescing
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.stop_matching import StopMatcher, StopStep, StopTokens

UNREAD_TOKENS_MAX = 16_384
"""Limit of tokens buffered for a client that does not read, about 100 bytes each. Beyond it the request fails. A token
with log probabilities counts as several."""
LOGPROB_TOKENS = 8
"""Tokens that a log probability counts as, and again for each of its top alternatives."""
LEG_TIMES = ("prefill_start_time", "prefill_end_time", "kv_transfer_start_time", "kv_transfer_end_time")


class Outlet(Protocol):
    """Sends a client's chunks; one implementation per form of response."""

    @property
    def is_writable(self) -> bool:
        """False while the client does not read; `on_writable`'s callback is called when it reads again."""
        ...

    def on_writable(self, callback: Callable[[], None]) -> None:
        """Set the function that is called each time it becomes writable again."""
        ...

    def chunk(self, chunk: pb.GenerateChunk) -> None:
        """Send the next chunk. Never blocks; may be called at any time."""
        ...


class Relay:
    """One client's stream. Tokens are pushed in, chunks are pushed out; the busier the process, the fewer."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        stop_tokens: StopTokens,
        record: RequestTrace,
        outlet: Outlet,
        coalescing: Coalescing,
        hold_max_s: float | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Nothing is sent before `open`.

        Args:
            detokenizer: turns tokens into text.
            stops: stop strings.
            stop_tokens: tokens that end the generation.
            record: counts the tokens and keeps their times.
            outlet: sends the chunks.
            coalescing: holds chunks while the process is busy.
            hold_max_s: the request's own limit for holding a chunk; None: the process's.
            loop: event loop whose clock is used; None: the running one.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._stop_tokens = stop_tokens
        self._record = record
        self._outlet = outlet
        self._coalescing = coalescing
        self._hold_max_s = coalescing.hold_max_s if hold_max_s is None else hold_max_s
        self._next_index = 0
        self._matched: generation_pb2.MatchedStop | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[generation_pb2.TokenLogprob] = []
        """Texts, tokens and log probabilities of the next chunk."""
        self._on_defect: Callable[[Exception], None] | None = None
        self._is_open = False
        self._is_held = False
        """Whether `coalescing` has it, also when its tokens have left since."""
        self._loop = loop or asyncio.get_running_loop()
        self._flushed_s = self._offered_s = -math.inf
        """When a chunk was sent, and when tokens arrived, for the last time."""
        self.due_s = 0.0
        """See `coalescing.Held`."""
        self.is_overrun = False
        """The client does not read, and the buffer limit is exceeded."""

    @property
    def ends_the_legs(self) -> bool:
        """Whether the legs must be aborted: the engine does not know the matched stop, or the client is too slow."""
        if self._matched is None:
            return self.is_overrun
        return self._matched.HasField("stop") or not self._stop_tokens.engine_stops_too

    @property
    def is_over(self) -> bool:
        """Whether a stop has matched: the client has everything but the finish."""
        return self._matched is not None

    def open(self, on_defect: Callable[[Exception], None] | None = None) -> None:
        """Begin to send chunks. `on_defect` is called when sending a held one fails; it must end the request."""
        self._is_open = True
        self._on_defect = on_defect
        self._outlet.on_writable(self.flush)
        self._send()

    def take(self, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprob]) -> None:
        """The next tokens; what follows a stop is dropped. On the hot path: once per request and step."""
        if self._matched is not None:
            return
        record = self._record
        now_s = record.clock()
        if self._stops.has_stops or self._stop_tokens.has_one_of(token_ids):
            taken, texts = 0, self._texts
            for token_id in token_ids:
                taken += 1
                if self._ends(token_id, record.token_count + taken, texts):
                    break
            token_ids = token_ids[:taken]
        else:
            self._texts.append(self._detokenizer.push(token_ids))
        count = len(token_ids)
        record.note_tokens(now_s, count)
        self._token_ids += token_ids
        if logprobs:
            self._logprobs += logprobs[:count]
        self._offer()

    def flush(self) -> None:
        """Send buffered tokens if the client reads. Called by timers and the client's call."""
        self._is_held = False
        try:
            self._send()
        except Exception as problem:  # a timer called it: the defect must fail this request
            if self._on_defect is None:
                raise
            self._on_defect(problem)

    def finish(
        self,
        prompt_tokens: int,
        decode: leg_pb2.LegFinish | None,
        prefill: leg_pb2.LegFinish | None,
        route: pb.Route,
    ) -> pb.GenerateFinish:
        """Send all text that was held back, and return the finish of the stream.

        Args:
            prompt_tokens: tokens of the prompt.
            decode: finish of the decode leg; None when a stop ended the stream here.
            prefill: finish of the prefill leg; None on an aggregated route, or when it did not arrive in time.
            route: the workers that served it.
        """
        if self._matched is None:
            text = self._push(self._detokenizer.flush(), self._record.token_count)
            if text.matched is not None:
                self._matched = generation_pb2.MatchedStop(stop=text.matched)
            self._texts.append(text.text if text.matched is not None else text.text + self._stops.flush())
        held = "".join(self._texts)
        if held or self._token_ids:
            self._outlet.chunk(self._chunk(held, self._token_ids, self._logprobs))
            self._texts, self._token_ids, self._logprobs = [], [], []
        finish = pb.GenerateFinish(reason=self._reason(decode), matched_stop=self._matched, route=route)
        finish.usage.prompt_tokens = prompt_tokens
        finish.usage.completion_tokens = self._record.token_count
        computing = prefill if prefill is not None else decode
        if computing is not None:
            # After a continuation the engine's prompt contains tokens of the response too.
            finish.usage.cached_tokens = min(computing.usage.cached_tokens, prompt_tokens)
            finish.prompt_logprobs.extend(computing.prompt_logprobs[: prompt_tokens - 1])
        self._fill_timings(finish.timings, decode, prefill)
        return finish

    def _send(self) -> None:
        if not self._token_ids or not self._is_open or not self._outlet.is_writable:
            return
        texts, token_ids, logprobs = self._texts, self._token_ids, self._logprobs
        self._texts, self._token_ids, self._logprobs = [], [], []
        self._flushed_s = self._loop.time()
        self._outlet.chunk(self._chunk("".join(texts), token_ids, logprobs))

    def _offer(self) -> None:
        """Send buffered tokens now, or hold them until they are due."""
        now_s = self._loop.time()
        gap_s, self._offered_s = now_s - self._offered_s, now_s
        if not self._is_open:
            return
        if not self._outlet.is_writable:
            if self._waiting_tokens() > UNREAD_TOKENS_MAX:
                self.is_overrun = True
            return
        due_s = self._flushed_s + self._coalescing.pressure * self._hold_max_s
        if due_s < now_s + gap_s:
            # Also the first token: nothing comes in time to leave together with it.
            self._send()
            return
        self.due_s = due_s
        if not self._is_held:
            self._is_held = True
            self._coalescing.hold(self)

    def _waiting_tokens(self) -> int:
        count = len(self._token_ids)
        return count * LOGPROB_TOKENS * (1 + len(self._logprobs[0].top)) if self._logprobs else count

    def _ends(self, token_id: int, count: int, texts: list[str]) -> bool:
        """Add a token's text. Returns whether the token ends the generation; `count` is its number, from 1."""
        if self._stop_tokens.matches(token_id, count):
            # The stop token's own text is not sent; text held back before it is.
            step = self._push(self._detokenizer.flush(), count)
            texts.append(step.text if step.matched is not None else step.text + self._stops.flush())
            self._matched = generation_pb2.MatchedStop(token_id=token_id)
            return True
        step = self._push(self._detokenizer.push((token_id,)), count)
        texts.append(step.text)
        if step.matched is not None:
            self._matched = generation_pb2.MatchedStop(stop=step.matched)
        return step.matched is not None

    def _push(self, text: str, count: int) -> StopStep:
        """Search the newest token's text for stop strings, which do not count before min_tokens."""
        return self._stops.push(text, may_end=self._stop_tokens.may_end(count))

    def _chunk(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[generation_pb2.TokenLogprob]
    ) -> pb.GenerateChunk:
        chunk = pb.GenerateChunk(index=self._next_index, text=text, token_ids=token_ids, logprobs=logprobs)
        self._next_index += 1
        return chunk

    def _reason(self, decode: leg_pb2.LegFinish | None) -> generation_pb2.FinishReason.ValueType:
        if self._matched is not None or decode is None:
            return generation_pb2.FINISH_REASON_STOP
        return decode.reason

    def _fill_timings(
        self, timings: generation_pb2.Timings, decode: leg_pb2.LegFinish | None, prefill: leg_pb2.LegFinish | None
    ) -> None:
        begin_s, first_s, last_s = self._record.begin_s, self._record.first_token_s, self._record.last_token_s
        timings.accepted_time.CopyFrom(timestamp(begin_s))
        for leg in (prefill, decode):
            if leg is None:
                continue
            # Both legs may report a transfer. Decode's end counts, because the KV has arrived there; its start is
            # prefill's, which writes. A decode engine may not know it.
            for name in LEG_TIMES:
                is_reported = name == "kv_transfer_start_time" and timings.HasField("kv_transfer_start_time")
                if leg.timings.HasField(name) and not is_reported:  # type: ignore[arg-type]
                    getattr(timings, name).CopyFrom(getattr(leg.timings, name))
        moved_bytes = kv_transfer_bytes(prefill, decode)
        if moved_bytes is not None:
            timings.kv_transfer_bytes = moved_bytes
        if decode is not None and decode.timings.HasField("recomputed_tokens"):
            timings.recomputed_tokens = decode.timings.recomputed_tokens
        if decode is not None:
            timings.kv_check = decode.timings.kv_check
        if first_s is not None and last_s is not None:
            timings.first_token_time.CopyFrom(timestamp(first_s))
            timings.last_token_time.CopyFrom(timestamp(last_s))
            waited = duration_pb2.Duration()
            waited.FromNanoseconds(int((first_s - begin_s) * 1e9))
            timings.time_to_first_token.CopyFrom(waited)
